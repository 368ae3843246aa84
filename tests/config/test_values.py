"""What may be written as a value, typed (TOML) or as text (environment, command line)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.config import setting, values
from clockwork_serve.config.values import DeviceChoice, Unfit, path, read_devices, size_or_share, span


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [
        ("1GB", 10**9), ("1 gb", 10**9), ("512MiB", 512 << 20), ("1.5KiB", 1536), (4096, 4096),
        ("4096", 4096),         ("2TiB", 2 << 40),
    ],
)  # fmt: skip
def test_a_size_is_decimal_or_binary_by_its_unit(written: object, nbytes: int) -> None:
    assert values.size(1)(written) == nbytes


@pytest.mark.parametrize(
    "written", ["1XB", "GB", "-1GB", "", "0", True, None, [1], "nan", "1e3", "9999999TB"]
)
def test_what_is_no_size_says_how_to_write_one(written: object) -> None:
    with pytest.raises(Unfit) as caught:
        values.size(1)(written)

    assert "512MiB" in caught.value.remedy


@pytest.mark.parametrize("written", [-1, 65536, "http", "80.5", 80.5, True, None, "", "9" * 5000])
def test_a_port_lies_between_0_and_65535(written: object) -> None:
    with pytest.raises(Unfit, match="0 to 65535"):
        values.port(written)


@pytest.mark.parametrize("written", ["off", "none", False])
def test_a_port_that_may_be_off(written: object) -> None:
    assert values.or_off(values.port)(written) is None


def test_off_is_offered_where_it_may_be_written() -> None:
    assert values.or_off(values.port)("8002") == 8002
    with pytest.raises(Unfit, match="or off"):
        values.or_off(values.port)("8002x")


def test_a_number_that_may_be_off() -> None:
    read = values.or_off(values.number(0, 100))
    assert (read("40"), read(0), read("off"), read(False)) == (40.0, 0.0, None, None)
    for wrong in ("101", -1, True, "x"):
        with pytest.raises(Unfit, match="from 0 to 100, or off"):
            read(wrong)


@pytest.mark.parametrize("written", ["nan", "inf", "0", 0, "-1", True, "x", None, "1e400"])
def test_a_number_above_zero_is_finite_and_positive(written: object) -> None:
    with pytest.raises(Unfit, match="above 0"):
        values.number(0, 10, above=True)(written)


@given(st.floats(0, 1000) | st.integers(0, 1000))
def test_a_number_reads_the_same_as_text(number: float) -> None:
    read = values.number(0, 1000)

    assert read(number) == read(str(number)) == float(number)


@given(st.integers(-50, 50))
def test_a_whole_number_reads_the_same_as_text(number: int) -> None:
    read = values.integer(-50, 50)

    assert read(number) == read(f" {number} ") == number


@pytest.mark.parametrize(("written", "value"), [("yes", True), ("Off", False), ("1", True), (False, False)])
def test_a_switch(written: object, value: bool) -> None:
    assert values.switch(written) is value


@pytest.mark.parametrize("written", ["maybe", 1, None, ""])
def test_what_is_no_switch(written: object) -> None:
    with pytest.raises(Unfit, match="true or false"):
        values.switch(written)


@pytest.mark.parametrize(
    ("written", "prefix"),
    [
        ("/clockwork-", "/clockwork-"),
        (" /x ", "/x"),
        ("/", "/"),
        ("off", None),
        ("None", None),
        (False, None),
    ],
)
def test_a_prefix_of_keys_or_off(written: object, prefix: str | None) -> None:
    assert values.prefix_or_off(written) == prefix


@pytest.mark.parametrize("written", ["", "clockwork-", "/a/b", "//", "/a\0b", "/" + "x" * 200, True, 1, None])
def test_what_is_no_prefix_says_how_to_write_one(written: object) -> None:
    with pytest.raises(Unfit, match="a slash and the first letters of keys, or off") as caught:
        values.prefix_or_off(written)

    assert "/clockwork-" in caught.value.remedy


@pytest.mark.parametrize("url", ["http://127.0.0.1:4318", "https://[::1]:4318/base", " http://collector "])
def test_a_url_is_read(url: str) -> None:
    assert setting("otlp_endpoint").read(url) == url.strip()


@pytest.mark.parametrize(
    "url", ["", "collector:4318", "ftp://x", "http://", "http://a b", "http://x/\n/", 7, None]
)
def test_what_is_no_url_is_refused(url: object) -> None:
    with pytest.raises(Unfit, match="a URL") as caught:
        setting("otlp_endpoint").read(url)
    assert "http://127.0.0.1:4318" in caught.value.remedy


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("models.example.com", ("models.example.com",)),
        (" A.example.com, box ", ("a.example.com", "box")),
        (["a", "b-1_2.example"], ("a", "b-1_2.example")),
    ],
)
def test_names_of_hosts_in_text_or_a_list(written: object, names: tuple[str, ...]) -> None:
    assert values.host_names(written) == names


@pytest.mark.parametrize(
    "written", ["", "a,", "a:80", "http://a", "*.a", "a b", ".a", [], [1], 1, None, ["a", ""]]
)
def test_what_are_no_names_of_hosts_says_how_to_write_them(written: object) -> None:
    with pytest.raises(Unfit, match="names of hosts, without ports") as caught:
        values.host_names(written)

    assert "models.example.com" in caught.value.remedy


def test_the_name_of_one_host() -> None:
    assert values.host_name(" Clockwork.internal ") == "clockwork.internal"
    for written in ("", "a,b", "a:80", "*.a", "10.0.0.4", None, ["a"]):
        with pytest.raises(Unfit, match="the name of a host"):
            values.host_name(written)


def test_a_share_is_told_from_a_size_by_its_type() -> None:
    read = size_or_share(1024)
    assert read("80%") == 0.8
    assert read(" 100 % ") == 1.0
    assert read("1MiB") == 1 << 20
    assert isinstance(read(4096), int)


@pytest.mark.parametrize("value", ["0%", "101%", "-5%", "%", "many%"])
def test_a_share_of_nothing_or_more_than_all_is_none(value: str) -> None:
    with pytest.raises(Unfit, match="a share above 0% and up to 100%"):
        size_or_share(1024)(value)


def test_what_is_neither_size_nor_share_hears_of_both() -> None:
    with pytest.raises(Unfit) as caught:
        size_or_share(1024)("12")
    assert "or a share" in caught.value.expected
    assert "80%" in caught.value.remedy


@pytest.mark.parametrize("written", ["models\udcff", "a\0b", "", " ", 3])
def test_what_is_no_text_is_no_path(written: object) -> None:
    with pytest.raises(Unfit):
        path(written)


# What ``--device`` may say.


def test_devices_without_a_number_get_the_next_free_one() -> None:
    chosen = read_devices(["cpu", "cpu:0", "cpu", "emulated:v100", "emulated:v100"])

    assert chosen == (
        DeviceChoice("cpu:1", "cpu"),
        DeviceChoice("cpu:0", "cpu"),
        DeviceChoice("cpu:2", "cpu"),
        DeviceChoice("emulated:0", "emulated", "v100"),
        DeviceChoice("emulated:1", "emulated", "v100"),
    )


def test_emulated_durations_may_vary_by_a_seed() -> None:
    (chosen,) = read_devices(["emulated:v100?jitter=.1&seed=7"])
    assert chosen == DeviceChoice("emulated:0", "emulated", "v100", jitter=0.1, seed=7)
    assert read_devices([chosen.written]) == (chosen,)
    for written in ("emulated:v100?speed=2", "emulated:v100?jitter=2", "emulated:v100?seed"):
        with pytest.raises(Unfit):
            read_devices([written])


def test_the_fewest_and_the_most_are_two_numbers() -> None:
    assert span(1, 100)("2..16") == (2, 16)
    for written in ("16..2", "0..2", "1..101", "2", 2, "2..", "..2", ""):
        with pytest.raises(Unfit, match=r"two whole numbers from 1 to 100 such as 2\.\.16"):
            span(1, 100)(written)


def test_devices_of_every_kind_are_numbered_apart() -> None:
    chosen = read_devices("cpu,torch-cpu,cuda,cuda,torch-cpu:3")

    assert [(each.device, each.kind) for each in chosen] == [
        ("cpu:0", "cpu"), ("torch-cpu:0", "torch-cpu"), ("cuda:0", "cuda"), ("cuda:1", "cuda"),
        ("torch-cpu:3", "torch-cpu"),
    ]  # fmt: skip


def test_a_list_may_be_written_as_text() -> None:
    assert read_devices("cpu, cpu") == read_devices(["cpu", "cpu"])


def test_a_profile_may_be_a_path_with_colons() -> None:
    assert read_devices(["emulated:/a:b.csv"])[0].profile == "/a:b.csv"


@pytest.mark.parametrize(
    ("specs", "remedy"),
    [
        (["cuda:x"], "'cuda:x' is none of these"),
        (["cpu:" + 5000 * "1"], "is none of these"),
        (["cuda:"], "none of these"),
        (["torch"], "'torch' is none of these"),
        (["cuda:0", "cuda:00"], "leave one of the equal ones out"),
        (["gpu"], "'gpu' is none of these"),
        (["cpu:x"], "none of these"),
        (["cpu:²"], "none of these"),
        (["emulated"], "name a profile"),
        (["emulated:"], "name a profile"),
        (["cpu:1", "cpu:01"], "leave one of the equal ones out"),
        ([], "--device cpu"),
        ([3], "--device cpu"),
        (7, "--device cpu"),
        ("", "none of these"),
    ],
)
def test_a_spec_that_does_not_fit_says_what_to_write(specs: object, remedy: str) -> None:
    with pytest.raises(Unfit) as caught:
        read_devices(specs)

    assert remedy in caught.value.remedy


def test_a_store_is_a_folder_or_a_url() -> None:
    assert values.folder_or_url(" s3://bucket/models ") == "s3://bucket/models"
    assert values.folder_or_url("~/store") == str(Path("~/store").expanduser())
    with pytest.raises(Unfit):
        values.folder_or_url("")


@pytest.mark.parametrize("lease", ["", "a/b", "x://a:1/b"])
def test_another_place_for_a_lease_is_refused(lease: str) -> None:
    with pytest.raises(Unfit):
        values.lease_name(lease)


def test_a_lease_in_etcd_is_refused_with_what_to_use() -> None:
    with pytest.raises(Unfit) as caught:
        values.lease_name("etcd://10.0.0.1:2379/main")
    assert "no longer in etcd" in caught.value.expected
    assert "--store" in caught.value.remedy
