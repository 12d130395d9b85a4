"""The benchmark of augmentation: mixed images, a row of each classifier, and the table."""

import pytest
import torch

from benchmarks.density import augmentation

pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")


def test_mixed_images_stand_with_both_labels():
    images, labels = torch.eye(4), torch.arange(4)
    mixed, of, weights = augmentation.mixup(images, labels, 0)
    torch.testing.assert_close(mixed.sum(1), torch.ones(len(mixed)))
    half = len(mixed) // 2
    torch.testing.assert_close(weights[:half] + weights[half:], torch.ones(half))
    apart = of[:half] != of[half:]
    place = torch.arange(half)[apart]
    torch.testing.assert_close(mixed[:half][place, of[:half][apart]], weights[:half][apart])


def test_what_is_added_weighs_as_much_as_the_real_images():
    real = torch.eye(4), torch.arange(4)
    images, labels, weights = augmentation.weighted(real, augmentation.mixup(*real, 0))
    assert len(images) == len(labels) == len(weights) == 4 + 2 * augmentation.MIXED
    torch.testing.assert_close(weights[:4], torch.ones(4))
    torch.testing.assert_close(weights[4:].sum(), torch.tensor(4.0))


def test_how_many_images_are_added_does_not_weaken_a_penalty():
    example, coefficients = augmentation.example(), []
    real, test = example["draw_split"](10, 0)
    for copies in (1, 10):
        added = real[0].repeat(copies, 1), real[1].repeat(copies), torch.ones(copies * len(real[0]))
        augmentation.accuracy("logistic", real, added, test)
        coefficients.append(torch.as_tensor(example["LOGISTIC"][-1].coef_))
    torch.testing.assert_close(*coefficients, rtol=0.0, atol=2e-3)  # they are up to 0.5; by optimization


def test_neighbors_get_the_likelier_label():
    real, test = augmentation.example()["draw_split"](10, 0)
    both = torch.cat([real[1], (real[1] + 1) % 10]), torch.tensor([0.9, 0.1]).repeat_interleave(len(real[1]))
    added = real[0].repeat(2, 1), *both
    assert augmentation.accuracy("1-NN", real, added, test) == augmentation.accuracy("1-NN", real, None, test)


@pytest.mark.slow
def test_rows_and_the_table(tmp_path):
    rows = [
        row
        for method in ("no augmentation", "mixup", "class Gaussian")
        for row in augmentation.measure(10, 0, method, "v")
    ]
    assert [row["error"] for row in rows] == [""] * 9
    assert all(0.7 < float(row["accuracy"]) < 0.97 for row in rows)
    flow = [{**row, "method": "conditional flow", "accuracy": str(float(row["accuracy"]) + 0.02)} for row in rows[:3]]
    again = [{**row, "seed": "1"} for row in (*rows, *flow)]
    text = augmentation.section([*rows, *flow, *again])
    assert "below no augmentation by more than a standard error: nowhere" in text
    assert "2.0 ± 0.0" in text
