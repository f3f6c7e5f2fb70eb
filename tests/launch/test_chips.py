"""Topologies and accelerator types by name, and what is refused."""

import pytest

from deltapref_jax.config import ConfigError
from launch.chips import CHIPS, parse_topology


@pytest.mark.parametrize(
    ("text", "slices", "name", "chips", "devices", "per_host"),
    [
        ("v5e:4x4", 1, "v5e:4x4", 16, 16, 4),
        ("v5litepod-16", 1, "v5e:4x4", 16, 16, 4),
        ("v5e:2x4", 1, "v5e:2x4", 8, 8, 8),
        ("v6e-8", 2, "2 x v6e:2x4", 16, 16, 8),
        ("v5p-64", 1, "v5p:2x4x4", 32, 32, 4),
        ("v5p-12288", 1, "v5p:16x16x24", 6144, 6144, 4),
        ("v5p:4x4x12", 1, "v5p:4x4x12", 192, 192, 4),
        ("V5P:2x2x1", 1, "v5p:2x2x1", 4, 4, 4),
        ("tpu7x-8", 1, "tpu7x:2x2x1", 4, 8, 8),
        ("h100:2x8", 1, "h100:2x8", 16, 16, 8),
        ("cpu", 1, "cpu:1x1", 1, 1, 1),
    ],
)
def test_names_are_read(text, slices, name, chips, devices, per_host):
    found = parse_topology(text, slices)
    assert (found.name, found.chips) == (name, chips)
    assert (found.devices.total, found.devices.per_host) == (devices, per_host)
    gpu_hosts = found.devices.total // per_host if found.chip.platform == "gpu" else slices
    assert found.devices.slices == gpu_hosts


@pytest.mark.parametrize(
    ("text", "slices", "sentence"),
    [
        (
            "v5e:3x3",
            1,
            "--topology is 'v5e:3x3'; v5e has the topologies 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, "
            "16x16.",
        ),
        (
            "v5litepod-12",
            1,
            "--topology is 'v5litepod-12'; the sizes of its kind are v5litepod-1, v5litepod-4, "
            "v5litepod-8, v5litepod-16, v5litepod-32, v5litepod-64, v5litepod-128, v5litepod-256.",
        ),
        ("h100:8", 2, "--num_slices is 2 and h100 has no slices; "),
        ("h100:ax8", 1, "--topology is 'h100:ax8'; give hosts and devices of a host, such as "),
        ("v9:4x4", 1, "--topology is 'v9:4x4'; known are v5e:1x1|2x2|2x4|4x4|4x8|8x8|8x16|16x16, "),
        ("v5p:4x12x4", 1, "--topology is 'v5p:4x12x4'; v5p has the topologies 2x2x1, "),
        ("v5p:16x16x28", 1, "--topology is 'v5p:16x16x28'; v5p has the topologies 2x2x1, "),
        ("v5p", 1, "--topology is 'v5p'; v5p has the topologies 2x2x1, "),
        ("x-8", 1, "--topology is 'x-8'; known are v5e:"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(text, slices, sentence):
    with pytest.raises(ConfigError) as e:
        parse_topology(text, slices)
    assert str(e.value).startswith(sentence)


def test_every_shape_of_a_chip_is_a_topology():
    for chip in CHIPS.values():
        sizes = [parse_topology(f"{chip.name}:{shape}").chips for shape in chip.shapes]
        assert sizes == sorted(sizes)
