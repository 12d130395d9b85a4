"""The examples run as they are, shortened, without a warning, and show what they set out to show."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from pyro_flows import datasets

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(name, *options):
    # A shortened fit may be far off; then the verdict and ArviZ's leave-one-out say so.
    allowed = ("unreliable", "Estimated shape parameter of Pareto distribution")
    silence = ["-W", "error", *(word for text in allowed for word in ("-W", f"ignore:{text}:UserWarning"))]
    command = [sys.executable, *silence, str(EXAMPLES / f"{name}.py"), "--smoke", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    return [float(found) for found in re.findall(pattern, text)]


def test_all_examples_are_tested_and_short():
    tested = {name.removeprefix("test_example_") for name in globals() if name.startswith("test_example_")}
    files = {path.stem for path in EXAMPLES.glob("*.py")}
    assert files == tested
    assert all(len(path.read_text(encoding="utf-8").splitlines()) < 80 for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow  # README and docs/start fit the eight schools, save them and compare predictions too
def test_example_eight_schools(tmp_path):
    text = run("eight_schools", "--out", tmp_path / "out")
    assert re.match("ok|corrected|refined|unreliable", text)
    assert "theta[Choate]" in text
    assert "elpd_loo" in text
    assert "read back with status" in text
    assert (tmp_path / "out" / "posterior.nc").is_file()
    (probability,) = numbers(r"ninth school > 0\) = (\S+)", text)
    assert 0.6 < probability < 0.95


@pytest.mark.slow  # docs/howto/svi.md trains and judges a flow guide in Pyro's own loop too
def test_example_custom_svi():
    flow, gaussian = numbers(r"ELBO (-?[\d.]+);", run("custom_svi"))
    assert flow > gaussian + 1


@pytest.mark.slow
def test_example_flow_prior():
    gaussian, flow = numbers(r"unseen pairs (\S+)", run("flow_prior"))
    assert flow > gaussian + 0.5


@pytest.mark.slow
def test_example_augmentation():
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
    text = run("augmentation")
    found = re.findall(r"10 a class, .*: real (\S+)%, with synthetic (\S+)%, only it (\S+)%, .* (\S+)%", text)
    assert len(found) == 3
    for real, both, fake, gaussian in ([float(value) for value in row] for row in found):
        assert 80 < real < 97
        assert both > real - 2  # one seed; a broken sampler, or labels mixed up, would cost much more
        assert min(fake, gaussian) > 80


@pytest.mark.slow
def test_example_speech(tmp_path):
    pytest.importorskip("librosa", reason="needs librosa: pip install 'pyro-flows[speech]'")
    if not Path(datasets.PROMPTS).is_dir():
        pytest.skip("needs recordings: apt-get install asterisk-core-sounds-en-wav")
    (nats,) = numbers(r"(\S+) nats a sample", run("speech", "--out", tmp_path))
    assert nats > 0.79  # a Gaussian's
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".png", ".wav"}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_examples_explain_their_options(name, monkeypatch, capsys):
    """In this process, which has imported what they need: each runs in one of its own above."""
    if name == "augmentation":
        pytest.importorskip("sklearn", reason="needs scikit-learn: pip install scikit-learn")
    if name == "speech":
        pytest.importorskip("librosa", reason="needs librosa: pip install 'pyro-flows[speech]'")
    path = str(EXAMPLES / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert ended.value.code == 0
    assert "--smoke" in capsys.readouterr().out
