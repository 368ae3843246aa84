"""What ``--device`` may say."""

from __future__ import annotations

import pytest

from clockwork_serve.config.table import DeviceChoice, Unfit, read_devices


def test_devices_without_a_number_get_the_next_free_one() -> None:
    chosen = read_devices(["cpu", "cpu:0", "cpu", "emulated:v100", "emulated:v100"])

    assert chosen == (
        DeviceChoice("cpu:1", "cpu"),
        DeviceChoice("cpu:0", "cpu"),
        DeviceChoice("cpu:2", "cpu"),
        DeviceChoice("emulated:0", "emulated", "v100"),
        DeviceChoice("emulated:1", "emulated", "v100"),
    )


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
