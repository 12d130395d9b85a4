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
