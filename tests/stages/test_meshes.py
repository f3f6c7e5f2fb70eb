"""Meshes of stages and models: which are chosen, what is refused, and what is said of them."""

import dataclasses

import pytest

from deltapref_jax.config import (
    ConfigError,
    Experiment,
    Generator,
    Judge,
    Lora,
    MeshShape,
    Model,
    Sampling,
    Scoring,
    Suite,
    Training,
)
from deltapref_jax.devices import Devices
from deltapref_jax.models.spec import ModelSpec
from deltapref_jax.stages.meshes import fit_meshes, fit_training, mesh_lines, training_lines

SPECS = {
    "8b": ModelSpec(128_256, 4096, 32, 32, 8, 128, 14_336, tied=False),
    "1b": ModelSpec(128_256, 2048, 16, 32, 8, 64, 8192),
    "odd": ModelSpec(1000, 48, 2, 3, 1, 16, 96),
}
GIB = 2**30
V5E = Devices(16, 4, 1, "tpu", int(15.75 * GIB))


def study(**fields):
    return dataclasses.replace(
        Experiment(
            student=Model("1b", "bfloat16"),
            generators=(
                Generator(name="small", model=Model("1b", "bfloat16")),
                Generator(name="big", model=Model("8b", "bfloat16")),
            ),
            judges=(
                Judge(name="exact"),
                Judge(name="m", kind="model", model=Model("8b", "bfloat16")),
            ),
            training=Training(rows=32),
            scoring=Scoring(rows=32),
            sampling=Sampling(max_prompt=512, max_tokens=512, slots=64),
        ),
        **fields,
    )


def sizes(e):
    """Sizes of every mesh, by what it belongs to."""
    meshes = {"training": e.training, "scoring": e.scoring, "sampling": e.sampling}
    meshes |= {item.name: item for item in (*e.generators, *e.judges)}
    return {name: dataclasses.astuple(item.mesh) for name, item in meshes.items()}


def fitted(devices=V5E, **fields):
    return sizes(fit_meshes(study(**fields), devices, SPECS.__getitem__))


def test_every_stage_and_model_has_a_mesh_of_its_own():
    assert fitted() == {
        "training": (1, 16, 1, 1),
        "scoring": (1, 16, 1, 1),
        "m": (1, 16, 1, 1),
        "exact": (0, 0, 0, 0),  # it runs on no device
        "sampling": (4, 1, 1, 1),
        "small": (4, 1, 1, 1),
        # 16 GB of weights fit no device, and with the cache not a half of one
        "big": (2, 1, 2, 1),
    }
    assert fitted(V5E._replace(memory=0))["big"] == (4, 1, 1, 1)
    assert fitted(V5E._replace(memory=5 * GIB))["big"] == (1, 1, 4, 1)


def test_the_room_for_a_cache_is_that_of_its_tiles():
    """129 positions are 256 on TPU: 2 GiB beside 2.3 of weights and 2 of prompts, not 1."""
    short = Sampling(max_prompt=64, max_tokens=65, slots=1024)
    found = {
        platform: fitted(V5E._replace(platform=platform, memory=6 * GIB), sampling=short)["small"]
        for platform in ("gpu", "tpu")
    }
    assert found == {"gpu": (4, 1, 1, 1), "tpu": (2, 1, 2, 1)}


def test_without_room_for_a_share_to_spare_the_shape_that_needs_least_is_chosen():
    """15 GiB of weights, 32 of cache and 8 of prompts leave no shape of four chips a twentieth."""
    long = Sampling(max_prompt=1024, max_tokens=3072, slots=64)
    assert fitted(sampling=long)["big"] == (1, 1, 4, 1)


def test_prompts_that_wait_for_slots_have_room_and_a_second_cache_need_none():
    """On eight chips the cache is 4 GiB on each by every mesh, beside 15 of weights in all.

    Over pairs of chips that is 11.5 of 15.75 GiB, and prompts of one sample would take 4 more.
    """
    e = study(
        student=Model("8b", "bfloat16"),
        sampling=Sampling(max_prompt=1024, max_tokens=3072, slots=64),
        suites=(Suite(name="s", samples=4),),
        training=Training(rows=8, lora=Lora(rank=8)),
    )
    found = sizes(fit_meshes(e, Devices(8, 8, 1, "tpu", V5E.memory), SPECS.__getitem__))
    assert (found["sampling"], found["big"]) == ((4, 1, 2, 1), (2, 1, 4, 1))


def test_a_model_without_room_changes_no_other_ones_mesh():
    """Training of 8B has no room on four chips; its sampler has the mesh that it has on sixteen."""
    e, four = study(student=Model("8b", "bfloat16")), V5E._replace(total=4)
    with pytest.raises(ConfigError, match=r"^Weights, gradients and moments of the model 8b need"):
        fit_meshes(e, four, SPECS.__getitem__)
    found = sizes(fit_meshes(e, four, SPECS.__getitem__, refuse=False))
    assert found["training"] == (1, 4, 1, 1)
    assert found["big"] == fitted()["big"] == (2, 1, 2, 1)
    e.training.mesh = MeshShape(data=4)  # what is stated is kept
    found = fit_meshes(e, four, SPECS.__getitem__, refuse=False)
    assert found.training.mesh == MeshShape(4, 1, 1, 1)


def test_slices_are_spanned_by_data_and_hosts_sample_alone():
    found = fitted(Devices(32, 4, 2, "tpu"))
    assert found["training"] == found["scoring"] == found["m"] == (2, 16, 1, 1)
    assert found["sampling"] == (4, 1, 1, 1)


def test_a_models_mesh_comes_before_its_stages():
    e = study(
        sampling=Sampling(slots=64, mesh=MeshShape(tensor=2)),
        scoring=Scoring(rows=32, mesh=MeshShape(tensor=4)),
        training=Training(rows=32, mesh=MeshShape(fsdp=8)),
    )
    e.generators[1].mesh.tensor = 4
    e.judges[1].mesh.data = 8
    assert sizes(fit_meshes(e, V5E, SPECS.__getitem__)) == {
        "training": (2, 8, 1, 1),
        "scoring": (1, 4, 4, 1),
        "m": (8, 2, 1, 1),
        "exact": (0, 0, 0, 0),
        "sampling": (2, 1, 2, 1),
        "small": (2, 1, 2, 1),
        "big": (1, 1, 4, 1),
    }
    assert sizes(e)["sampling"] == (0, 0, 2, 0)  # the config is as it was


def test_quantised_models_need_less_room():
    """8 billion parameters in one byte fit a device of a v5e, and those in two do not."""
    e = study()
    for item in (e.generators[1], e.judges[1]):
        item.model.quantization = "int8"
        item.mesh.data = -1
    assert sizes(fit_meshes(e, V5E, SPECS.__getitem__))["big"] == (4, 1, 1, 1)
    e.judges[1].model.quantization = ""
    with pytest.raises(ConfigError, match=r"^Weights of the model 8b need 15\.0 GiB on each of"):
        fit_meshes(e, V5E._replace(memory=14 * GIB), SPECS.__getitem__)


def test_nothing_is_chosen_on_one_device():
    found = fitted(Devices(1, 1))
    assert set(found.values()) == {(1, 1, 1, 1), (0, 0, 0, 0)}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {"sampling": Sampling(slots=64, mesh=MeshShape(fsdp=16))},
            "config.sampling.mesh is fsdp=16 and there are 4 devices; the sizes must multiply to "
            "that; nearest that fits: fsdp=4 or data=2 fsdp=2.",
        ),
        (
            {"sampling": Sampling(slots=6, mesh=MeshShape(data=4))},
            "config.sampling.slots is 6 and config.sampling.mesh spreads slots over 4 of 4 devices "
            "(data x fsdp); make slots a multiple of that; nearest that fits: data=2 tensor=2 or "
            "tensor=4.",
        ),
        (
            {"generators": (Generator(name="g", model=Model("8b"), mesh=MeshShape(tensor=8)),)},
            "config.generators[0].mesh is tensor=8 and there are 4 devices; the sizes must "
            "multiply to that; nearest that fits: tensor=4 or fsdp=2 tensor=2.",
        ),
        (
            {"judges": (Judge(name="m", kind="model", mesh=MeshShape(fsdp=3)),)},
            "config.judges[0].mesh is fsdp=3 and there are 16 devices; the sizes must multiply to "
            "that; nearest that fits: data=4 fsdp=4 or data=2 fsdp=4 tensor=2.",
        ),
        (
            {"generators": (Generator(name="g", model=Model("8b"), mesh=MeshShape(data=4)),)},
            "Weights of the model 8b need 29.9 GiB on each of 4 devices by "
            "config.generators[0].mesh, and a device has 15.8 GiB; take more devices or another "
            "mesh; nearest that fits: data=2 tensor=2 or data=2 fsdp=2.",
        ),
        (
            {"training": Training(rows=32, mesh=MeshShape(data=16))},
            "Weights, gradients and moments of the model 1b need 18.4 GiB on each of 16 devices by "
            "config.training.mesh, and a device has 15.8 GiB; take more devices or another mesh; "
            "nearest that fits: data=8 fsdp=2 or data=8 tensor=2.",
        ),
        (
            {
                "generators": (Generator(name="g", model=Model("odd"), mesh=MeshShape(tensor=4)),),
            },
            "config.generators[0].mesh is tensor=4 and 4 devices along tensor do not divide "
            "blocks.k, blocks.o, blocks.q, blocks.v of odd; nearest that fits: data=4 or data=2 "
            "fsdp=2.",
        ),
    ],
)
def test_a_mesh_that_fits_neither_devices_nor_model_is_one_sentence(fields, sentence):
    with pytest.raises(ConfigError) as e:
        fit_meshes(study(**fields), V5E, SPECS.__getitem__)
    assert str(e.value) == sentence


def test_adapters_need_room_for_the_weights_alone():
    small = V5E._replace(memory=3 * GIB)
    student, of = Model("1b"), SPECS.__getitem__
    data = Training(rows=32, mesh=MeshShape(data=-1))
    with pytest.raises(ConfigError, match="^Weights, gradients and moments of the model 1b need"):
        fit_training(data, student, small, of)
    adapters = dataclasses.replace(data, lora=Lora(rank=8))
    assert fit_training(adapters, student, small, of).mesh == MeshShape(16, 1, 1, 1)


def test_moments_on_a_host_without_pinned_memory_are_refused():
    devices, of = V5E._replace(pinned_host=False), SPECS.__getitem__
    data = Training(rows=32)
    assert fit_training(data, Model("1b"), devices, of).mesh == MeshShape(1, 16, 1, 1)
    with pytest.raises(ConfigError) as e:
        fit_training(dataclasses.replace(data, offload_moments=True), Model("1b"), devices, of)
    assert str(e.value) == (
        "config.training.offload_moments is True and the 16 devices (tpu) have no pinned memory of "
        "their host; leave it out."
    )


def test_a_chosen_mesh_divides_every_matrix():
    """Four devices would have a quarter of the heads each, of which `odd` has six."""
    e = study(sampling=Sampling(slots=2), generators=(Generator(name="g", model=Model("odd")),))
    with pytest.raises(ConfigError, match=r"^config\.sampling\.mesh is not stated and"):
        fit_meshes(e, Devices(4, 4), SPECS.__getitem__)


def test_the_meshes_are_said():
    e = study(judges=(), generators=(Generator(name="small", model=Model("1b")),))
    e.sampling.mesh.tensor = 4
    fit = fit_meshes(e, V5E._replace(memory=0), SPECS.__getitem__)
    assert mesh_lines(fit, V5E) == [
        "Meshes: training fsdp=16; scoring fsdp=16; on each host sampling tensor=4.",
    ]
    assert mesh_lines(fit_meshes(e, Devices(4, 4), SPECS.__getitem__), Devices(1, 1)) == []
    assert training_lines(fit.training) == ["Mesh: training fsdp=16."]
    assert training_lines(Training(mesh=MeshShape(1, 1, 1, 1))) == []
