"""The studies: what they conclude from numbers, and all of them from beginning to end on few data."""

import importlib
import itertools
import json
import math
import sys

import pytest
import torch
from conftest import ROOT

FEW = ["--epochs", "1", "--seeds", "1", "--limit", "200"]


@pytest.fixture(scope="module", autouse=True)
def _studies_on_the_path():
    sys.path.insert(0, str(ROOT / "scripts" / "studies"))
    yield
    sys.path.pop(0)


@pytest.fixture
def run(tmp_path, monkeypatch, shared_data):
    """Call a study's main as a command line in an empty folder; returns its report and its results."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYRO_VAE_DATA", str(shared_data))

    def call(name, *arguments, **constants):
        for constant, value in constants.items():
            monkeypatch.setattr(f"{name}.{constant}", value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *FEW, *arguments])
        importlib.import_module(name).main()
        results = tmp_path / "results"
        return (results / f"{name}.md").read_text(), results

    return call


# ------------------------------------------------------------------------------------ conclusions


def test_a_difference_counts_from_two_standard_errors_on():
    import study

    # Means 1 and 0, errors of both sqrt(1/3): the difference has the error sqrt(2/3) = 0.816.
    noisy = [0.0, 1.0, 2.0]
    assert not study.is_above(noisy, [v - 1 for v in noisy])
    assert study.is_above(noisy, [v - 1.7 for v in noisy])
    assert not study.is_above([v - 1.7 for v in noisy], noisy)
    assert not study.is_above([5.0], [0.0])  # of one seed nothing is known
    assert study.mean_and_error(noisy) == (1.0, pytest.approx(1 / math.sqrt(3)))
    assert study.cell(noisy, 1) == "1.0 ± 0.6"
    assert study.cell([2.0]) == "2.00"


def test_verdicts():
    import study

    assert study.verdict({"here": True, "there": True}) == "holds"
    assert study.verdict({"here": True, "there": False}) == "holds only here"
    assert study.verdict(dict.fromkeys("abc", True) | {"d": False}) == "holds only a, b and c"
    assert study.verdict({"here": False, "there": False}) == "does not hold"


def test_every_claim_looks_at_what_it_says():
    """Numbers that only one claim can tell from those of a world in which nothing holds."""
    import latent_space
    import latent_space_report as report

    fitted = ("prior fitted to", "box around", "normal fitted to", "mixture fitted to")
    densities = ["prior", "even prior", *(f"{way} the codes" for way in fitted)]
    measures = ["path_length", "detours", "lipschitz_largest", "log_likelihood_at_code"]
    measures += ["log_marginal_of_1000", "linear", "nearest_neighbours"]

    def world(**better):
        records = {}
        for *setting, seed in itertools.product(latent_space.KINDS, latent_space.LATENTS, range(3)):
            value = 1.0 + 0.001 * seed
            record = dict.fromkeys(measures, value)
            record["completeness"] = {name: {"both": value} for name in densities}
            record["variance"] = [[n, 0.1 + 1e-4 * seed] for n in range(30)]
            for where, number in better.items():
                kind, measure = where.split("__")
                if setting[0] == kind.replace("_", " ") and measure in densities:
                    record["completeness"][measure] = {"both": number}
                elif setting[0] == kind.replace("_", " "):
                    record[measure] = number
            records[latent_space.Setting(*setting, seed)] = record
        return records

    def holding(records):
        def holds(claim):
            above = (report.study.is_above(claim.more(n), claim.less(n)) for n in latent_space.LATENTS)
            return all(above)

        return {claim.text for claim in report.claims(records) if holds(claim)}

    assert holding(world()) == set()
    found = holding(world(VAE__prior=2.0))
    assert len(found) == 5  # against three densities of the autoencoder's codes, and two without KL
    assert all("holes" in text or "mixture" in text for text in found)
    assert holding(world(autoencoder__path_length=3.0)) == {
        "A VAE is continuous where an autoencoder is not: walks between codes are straighter"
    }
    assert holding(world(**{"VQ-VAE__log_marginal_of_1000": 3.0})) == {
        "... and it is the better density model"
    }
    first, then = "The variance of q is small at first and then grows", "... towards 1"
    for values, expected in (
        ((0.1, 0.4), {first}),
        ((0.1, 0.8), {first, then}),
        ((0.9, 0.6), {then}),
        ((0.9, 0.1), set()),
    ):
        curve = [[n, values[0] if n < 10 else values[1]] for n in range(30)]
        assert holding(world(VAE__variance=curve)) & {first, then} == expected


def test_log_p_of_a_single_code_is_a_sum_over_all():
    import latent_space

    from pyro_vae import elbo, vq_vae

    model, guide = vq_vae(6, num_codes=5, code_dim=2, length=1, hidden=(8,))
    guide.codebook.vectors.normal_()
    x = torch.rand(250, 6).round()
    each = model.likelihood(guide.codebook.vectors.unsqueeze(1)).log_prob(x) - math.log(5)
    found = latent_space.log_marginal_of_codes(model, guide, x)
    assert found == pytest.approx(each.logsumexp(0).mean().item(), rel=1e-5)
    model, guide = vq_vae(6, num_codes=5, code_dim=2, length=2, hidden=(8,))
    found = latent_space.log_marginal_of_codes(model, guide, x)
    assert found == pytest.approx(elbo(model, guide, x).elbo.mean().item(), rel=1e-6)


def test_sharpness_is_that_of_the_laplacian():
    import blur

    flat = torch.ones(3, 36)
    assert blur.sharpness(flat, (6, 6)) == pytest.approx(0)
    point = torch.zeros(1, 7, 7)
    point[0, 3, 3] = 1  # a Laplacian of -4 once and 1 four times, among 25
    values = torch.tensor([-4.0, 1, 1, 1, 1, *[0] * 20])
    assert blur.sharpness(point.flatten(1), (7, 7)) == pytest.approx(values.var().item())
    noise = torch.rand(50, 20, 20)
    blurred = torch.nn.functional.avg_pool2d(noise, 3, 1)
    assert blur.sharpness(blurred, (18, 18)) < 0.2 * blur.sharpness(noise, (20, 20))


# ------------------------------------------------------------------------------------ whole studies


@pytest.mark.slow
def test_latent_space(run, monkeypatch):
    monkeypatch.setattr("latent_space_report.ROWS_PER_EPOCH", 1)
    text, results = run("latent_space", ROWS_PER_EPOCH=1, NUM_SAMPLES=50, NUM_PAIRS=20)
    assert text.count("does not hold") == 16  # of one seed nothing is known
    for name in ("plane", "samples", "variance", "walks"):
        assert (results / "figures" / f"latent_space_{name}.png").stat().st_size > 10_000
    records = [json.loads(path.read_text()) for path in (results / "studies" / "latent_space").glob("*.json")]
    assert len(records) == 8
    vae = next(r for r in records if r["setting"]["kind"] == "VAE")
    assert vae["kl"] == pytest.approx(vae["mutual_information"] + vae["marginal_kl"], rel=1e-4)


@pytest.mark.slow
def test_tasks(run, monkeypatch):
    monkeypatch.setattr("latent_space.ROWS_PER_EPOCH", 1)
    short = {"num_chains": 4, "num_draws": 6, "num_warmup": 12, "num_leapfrog": 2}
    few = ("--num-images", "12", "--num-temperatures", "5")
    text, results = run("tasks", *few, FREY_EPOCHS=2, CHAINS=short)
    assert "| frey_face | super-resolution | posterior |" in text
    assert (results / "figures" / "tasks_mnist_inpainting.png").stat().st_size > 10_000
    record = json.loads((results / "studies" / "tasks" / "frey_face.json").read_text())
    assert set(record["tasks"]) == {"inpainting", "denoising", "super-resolution"}
    mean_image = record["tasks"]["denoising"]["psnr"]["mean image"]
    assert len(mean_image) == 12
    assert 5 < min(mean_image) <= max(mean_image) < 40


@pytest.mark.slow
def test_blur(run):
    import blur

    names = ("family: mixtures of logistics", "posterior: a flow", "bound: importance-weighted, 20 draws")
    systems = {name: blur.SYSTEMS[name] for name in (blur.BASE, *names)}
    text, results = run(
        "blur", SYSTEMS=systems, FREY_EPOCHS=2, NUM_IMAGES=3, NUM_SAMPLES=50, NUM_TEMPERATURES=20
    )
    assert "| posterior: a flow |" in text
    assert len(list((results / "studies" / "blur").glob("*.json"))) == 4


@pytest.mark.slow
def test_vq_vae(run):
    text, results = run("vq_vae", NUM_SAMPLES=50, NUM_DRAWS=20)
    assert "| VQ-VAE | transformer |" in text
    of = {kind: json.loads((results / "studies" / "vq_vae" / f"{kind},seed0.json").read_text())
          for kind in ("vae", "vq-vae")}  # fmt: skip
    even = of["vq-vae"]["log_likelihood_at_code"] - 49 * math.log(64)  # the bound, of an even prior
    assert of["vq-vae"]["of the training"]["elbo"] == pytest.approx(even, rel=1e-4)
    assert of["vae"]["fitted afterwards"]["gap"] > 0
