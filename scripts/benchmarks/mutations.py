"""Break formulas one by one, and see whether the fast tests notice.

    python scripts/benchmarks/mutations.py
    python scripts/benchmarks/mutations.py --only objectives tasks --jobs 1

Every mutation changes one formula of the package in a copy of the repository: a sign, an off-by-one, a
Jacobian, N for N - 1, an axis. The tests of its room run first, and where they all pass the whole fast suite.
Prints a Markdown table of what failed first, and the score.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import tyro

ROOT = Path(__file__).resolve().parents[2]
FIRST = {  # tests of a room, which run before all others
    "objectives": ["objectives", "wake_sleep"],
    "distributions": ["distributions", "networks", "autoencoder"],
    "traces": ["traces", "contract", "objectives", "hmc", "estimators"],
    "marginal_likelihood": ["marginal_likelihood", "results", "bayesian", "estimators"],
    "mcmc": ["hmc", "marginal_likelihood", "estimators"],
    "latents": ["latents"],
    "tasks": ["tasks"],
    "models": ["contract", "bayesian", "autoencoder", "networks"],
    "algorithms": ["mcem", "wake_sleep", "svi"],
    "training": ["training"],
    "data": ["data"],
    "nets.py": ["nets", "networks", "autoencoder"],
}
# File, what stands there once, and what is put in its place.
MUTATIONS = [
    ("objectives/importance.py", "logsumexp(0) - math.log(len(log_weights))", "logsumexp(0)"),
    ("objectives/importance.py", "- (log_q - score + score.detach())", "- log_q"),
    (
        "objectives/importance.py",
        "weights = log_w.detach().softmax(0)",
        "weights = log_w.detach().softmax(1)",
    ),
    ("objectives/importance.py", "log_w.mean(0), 1 - self.alpha", "log_w.mean(0), 1 + self.alpha"),
    ("objectives/importance.py", "bound = mean + log_mean / order", "bound = mean + log_mean * order"),
    (
        "objectives/importance.py",
        "-(log_w.softmax(0) * (log_p + log_q))",
        "-(log_w.softmax(0) * (log_p - log_q))",
    ),
    ("objectives/importance.py", "log_w = (log_p - log_q).detach()", "log_w = log_p.detach()"),
    ("objectives/weighted.py", "len(batch[0]) / self.num_data * log_prior", "log_prior"),
    ("objectives/weighted.py", 'name.endswith("weight")', 'name.endswith("s")'),
    ("objectives/weighted.py", 'msg["scale"] * self.factor', 'msg["scale"] / self.factor'),
    ("objectives/weighted.py", "means.clamp(min=self.free_nats)", "means.clamp(max=self.free_nats)"),
    ("objectives/weighted.py", "site.flatten(end_dim=1).mean(0)", "site.flatten(end_dim=1).sum(0)"),
    ("objectives/base.py", "-loss.detach() / len(batch[0])", "-loss.detach()"),
    ("objectives/wake_sleep.py", "-(wake + sleep).sum()", "-(wake - sleep).sum()"),
    ("distributions/base.py", "soft_clamp(log_variance / 2, *", "soft_clamp(log_variance, *"),
    ("distributions/counts.py", "unchecked.log_prob(value.double())", "unchecked.log_prob(value)"),
    ("distributions/counts.py", ".log() - shape.log()", ".log() + shape.log()"),
    (
        "distributions/counts.py",
        "F.logsigmoid(self.gate_logits)), counted",
        "F.logsigmoid(-self.gate_logits)), counted",
    ),
    ("distributions/grey.py", "math.log(2) + logits**2 / 12", "logits**2 / 12"),
    ("distributions/grey.py", "torch.log(safe / torch.tanh(safe / 2))", "torch.log(safe / torch.tanh(safe))"),
    ("distributions/grey.py", "half = bin_width / 2 / self.scale", "half = bin_width / self.scale"),
    ("distributions/grey.py", "torch.expm1(-2 * half)", "torch.expm1(-half)"),
    ("distributions/grey.py", "1 / (self.levels - 1)", "1 / self.levels"),
    ("distributions/grey.py", "(2 * k + 1) * above", "(2 * k) * above"),
    ("distributions/splines.py", "- 2 * denominator.log()", "- denominator.log()"),
    ("distributions/splines.py", "(first + second - 2 * slope) * mixed", "(first + second - slope) * mixed"),
    (
        "distributions/posteriors.py",
        "normals.log_prob(value.unsqueeze(-2)).sum(-1)",
        "normals.log_prob(value.unsqueeze(-2)).mean(-1)",
    ),
    (
        "distributions/posteriors.py",
        "(self.loc - each) / self.scale.square()",
        "(self.loc - each) / self.scale",
    ),
    ("distributions/continuous.py", "self.scale(log_variance).square()", "self.scale(log_variance)"),
    ("distributions/codes.py", "2 * z @ vectors.T", "z @ vectors.T"),
    ("distributions/codes.py", "(1 - self.decay) * is_of.sum(0)", "self.decay * is_of.sum(0)"),
    (
        "traces/densities.py",
        "sum_sites(priors + others, num_samples) - log_prior)",
        "sum_sites(priors + others, num_samples))",
    ),
    (
        "traces/unconstrained.py",
        "fn.log_prob(z) + number.log_abs_det_jacobian(u, z)",
        "fn.log_prob(z) - number.log_abs_det_jacobian(u, z)",
    ),
    (
        "models/bayesian.py",
        "scale=len(batch[0]) / self.num_data):\n            for name, value in self.template",
        "scale=1.0):\n            for name, value in self.template",
    ),
    ("latents/information.py", "variance.squeeze(0).mean(0)", "variance.squeeze(0).sum(0)"),
    ("distributions/posteriors.py", ".cumsum(-1) - log_density", ".cumsum(-1)"),
    (
        "mcmc/hmc.py",
        "p + sizes[n] / 2 * at.gradient[n] for n, p in momentum.items()}\n        position",
        "p + sizes[n] * at.gradient[n] for n, p in momentum.items()}\n        position",
    ),
    (
        "mcmc/hmc.py",
        "_kinetic_energy(momentum) - at.log_density - before",
        "_kinetic_energy(momentum) + at.log_density - before",
    ),
    ("mcmc/hmc.py", "for p in momentum.values()) / 2", "for p in momentum.values())"),
    ("mcmc/hmc.py", "(acceptance - target_acceptance)).clamp", "(target_acceptance - acceptance)).clamp"),
    ("mcmc/tempering.py", "base + beta * (joint - base)", "base + beta * joint"),
    ("mcmc/tempering.py", "(beta - before) * (state.at.parts", "beta * (state.at.parts"),
    ("mcmc/tempering.py", "sum(point.log_joint) + point.log_jacobian", "sum(point.log_joint)"),
    (
        "mcmc/tempering.py",
        "log_base = log_base + point.log_jacobian",
        "log_base = log_base - point.log_jacobian",
    ),
    ("mcmc/posterior.py", "weights = log_weights.softmax(0)", "weights = (0 * log_weights).softmax(0)"),
    ("mcmc/diagnostics.py", "3 * math.sqrt(num_samples)", "30 * math.sqrt(num_samples)"),
    ("marginal_likelihood/importance.py", "self.log_sum - math.log(self.count)", "self.log_sum"),
    ("marginal_likelihood/importance.py", "(1 / ess - 1 / self.count)", "(1 / ess)"),
    ("marginal_likelihood/importance.py", "(2 * log_w).logsumexp(1)", "log_w.logsumexp(1)"),
    ("marginal_likelihood/averaging.py", "values.logsumexp(0) - math.log(count)", "values.mean(0)"),
    ("marginal_likelihood/averaging.py", ".std(0) / math.sqrt(count)", ".std(0)"),
    (
        "marginal_likelihood/exact.py",
        "sum(log_joint(self.model, {}, *block))[0]",
        "log_joint(self.model, {}, *block)[1][0]",
    ),
    ("marginal_likelihood/lattices.py", "self.dim * math.log(spacing)", "math.log(spacing)"),
    ("marginal_likelihood/lattices.py", "v.cosh().log().sum(-1)", "v.sinh().abs().log().sum(-1)"),
    (
        "marginal_likelihood/lattices.py",
        "point.log_joint.log_prior + point.log_jacobian",
        "point.log_joint.log_prior",
    ),
    ("latents/information.py", ".var(0, correction=0) > threshold", ".var(1, correction=0) > threshold"),
    ("latents/information.py", ".logsumexp(1) - math.log(num_data)", ".logsumexp(1)"),
    (
        "latents/information.py",
        "log_q - log_prior, log_q - aggregate, aggregate - log_prior",
        "log_q - log_prior, aggregate - log_q, aggregate - log_prior",
    ),
    ("latents/regularity.py", "((1 - t) * angle).sin() * start", "(t * angle).sin() * start"),
    ("latents/regularity.py", "steps.amax(0) / steps.mean(0)", "steps.mean(0) / steps.amax(0)"),
    ("tasks/restoring.py", "variance + mean.square()).double().sum(0)", "variance).double().sum(0)"),
    (
        "tasks/degradations.py",
        "gain = variance / (variance + self.noise_scale**2)",
        "gain = variance / (variance + self.noise_scale)",
    ),
    (
        "tasks/degradations.py",
        "variance @ self.matrix.square().T + noise",
        "variance @ self.matrix.T + noise",
    ),
    ("tasks/degradations.py", "variance - (cross * gain).sum(-2)", "variance + (cross * gain).sum(-2)"),
    (
        "tasks/restoring.py",
        "complete.std_error.square() + partial.std_error.square()",
        "complete.std_error.square() - partial.std_error.square()",
    ),
    ("tasks/codes.py", "-found.values, found.std_error", "found.values, found.std_error"),
    (
        "algorithms/mcem.py",
        "_ADAPTATION * (acceptance - self.target_acceptance)",
        "_ADAPTATION * (self.target_acceptance - acceptance)",
    ),
    (
        "algorithms/mcem.py",
        "sum(point.log_joint) + point.log_jacobian",
        "sum(point.log_joint) - point.log_jacobian",
    ),
    ("traces/sites.py", "torch.where(mask, log_prob, -math.log(count))", "torch.where(mask, log_prob, 0.0)"),
    (
        "traces/sites.py",
        "if len(terms) < len(sites) else -log_prob",
        "if len(terms) < len(sites) else log_prob",
    ),
    ("traces/unconstrained.py", "(each + log_shares).logsumexp(-1)", "each.logsumexp(-1)"),
    (
        "traces/unconstrained.py",
        "b * logsigmoid(-t) + (a + b).lgamma()",
        "b * logsigmoid(-t) - (a + b).lgamma()",
    ),
    ("traces/unconstrained.py", "uniform.log() / concentration", "uniform.log()"),
    (
        "models/bayesian.py",
        "with poutine.scale(scale=len(batch[0]) / self.num_data):\n            for name, distribution",
        "with poutine.scale(scale=1.0):\n            for name, distribution",
    ),
    ("models/autoencoder.py", "(encoding - vectors.detach())", "(encoding.detach() - vectors.detach())"),
    (
        "models/autoencoder.py",
        "cost = cost + (encoding.detach() - vectors)",
        "cost = cost - (encoding.detach() - vectors)",
    ),
    ("nets.py", "dtype=torch.bool).triu(1)", "dtype=torch.bool).triu(2)"),
    ("nets.py", "observed.to(inputs.dtype)], -1)", "(~observed).to(inputs.dtype)], -1)"),
    ("nets.py", "inputs.clamp(min=0).log1p()", "inputs.clamp(min=0)"),
]


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Break formulas one by one, and see whether the fast tests notice."""

    only: tuple[str, ...] = ()
    """Rooms, such as objectives; default: all."""
    jobs: int = 2
    """Mutations at once, each in a copy of its own."""
    whole: bool = True
    """Run the whole fast suite where the tests of the room notice nothing."""


def main() -> None:
    """Check that every formula is there, break each, report."""
    arguments = tyro.cli(Arguments)
    chosen = [m for m in MUTATIONS if not arguments.only or room(m[0]) in arguments.only]
    for path, old, _ in chosen:
        count = (ROOT / "pyro_vae" / path).read_text().count(old)
        if count != 1:
            sys.exit(f"{path} has {count} times {old!r}: mend the list")
    copies: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.jobs):
            copy = Path(folder) / str(number) / "repository"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__"))
            os.symlink(ROOT.parent / "shared", copy.parent / "shared")
            copies.put(copy)

        def attempt(mutation: tuple[str, str, str]) -> str:
            copy = copies.get()
            try:
                return broken(copy, *mutation, whole=arguments.whole)
            finally:
                copies.put(copy)

        print("| file | formula | broken | noticed first by |\n|---|---|---|---|", flush=True)
        survivors = 0
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for (path, old, new), noticed in zip(chosen, pool.map(attempt, chosen), strict=True):
                survivors += not noticed
                cells = (" ".join(text.split()).replace("|", "\\|") for text in (old, new))
                formula, change = (f"`{cell}`" for cell in cells)
                print(f"| {path} | {formula} | {change} | {noticed or '**nothing**'} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} mutations were noticed.")


def room(path: str) -> str:
    """First part of a path, which the tests go by."""
    return path.partition("/")[0]


def broken(copy: Path, path: str, old: str, new: str, *, whole: bool) -> str:
    """Name of the first test that fails with a mutation, or ''."""
    file = copy / "pyro_vae" / path
    text = file.read_text()
    file.write_text(text.replace(old, new))
    try:
        first = [f"tests/test_{name}.py" for name in FIRST[room(path)]]
        return first_failure(copy, first) or (first_failure(copy, ["tests"]) if whole else "")
    finally:
        file.write_text(text)


def first_failure(copy: Path, tests: list[str]) -> str:
    """Name of the first test that fails, or ''."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=no", *tests],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return ""
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split()[1].removeprefix("tests/") if failed else "an error in collecting"


if __name__ == "__main__":
    main()
