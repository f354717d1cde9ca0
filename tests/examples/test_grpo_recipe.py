"""The recipe of GRPO: what it rewards, what it samples, what an update sees."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo
from trainer.data.text import end_of_text
from trainer.decode.decoder import GREEDY, Sampling
from trainer.decode.rollout import sample_rows
from trainer.errors import TrainingError
from trainer.model.language_model import hidden_and_head
from trainer.recipe import run_recipe
from trainer.report.metrics import read_records
from trainer.run.trained import Trained, load


@pytest.fixture(scope="module")
def trained(demo_run: Path) -> Trained:
    return load(demo_run)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples, few tokens, large steps."""
    for name, value in {
        "PROMPTS": 4,
        "GROUP": 8,
        "LENGTH": 24,
        "TOKENS": 8,
        "MINIBATCHES": 2,
        "OPTIMIZER": optax.adam(1e-2),
    }.items():
        monkeypatch.setattr(grpo, name, value)


def test_the_reward_is_how_much_python_parses() -> None:
    prompt = "def f(x):\n    "
    assert grpo.reward(prompt, "return x\n") == pytest.approx(2 / grpo.ENOUGH)
    one = grpo.reward(prompt, "y = x\n")
    two = grpo.reward(prompt, "y = x\n    y = x\n")
    assert two == pytest.approx(one + 5 / grpo.ENOUGH)
    # What follows the last line that parses is not counted, nor comments and blanks.
    assert grpo.reward(prompt, "y = x\n    y = (\n  z") == one
    assert grpo.reward(prompt, "y = x\n\n\n# and more of it\n") == one
    assert grpo.reward(prompt, "y = x + '\\d'\n") > one
    for nothing in ("", "y = x", "= x\n", "# y\n", "pass\n", "y = '\0'\n"):
        assert grpo.reward(prompt, nothing) == 0, nothing
    assert grpo.reward(prompt, "y = x + x + x + x + x\n" + "y = [[[x]]]\n" * 9) == 1
    assert grpo.reward(prompt, "(" * 500 + "x" + ")" * 500 + "\n") == 0


def test_prompts_are_headers_of_functions(trained: Trained, small: None) -> None:
    prompts = next(grpo.prompts_of(trained, 0))
    assert len(prompts) == 32
    assert len(set(prompts[:8])) == 1
    assert all(grpo.count_nodes(prompt + "pass") for prompt in prompts)
    again, other = (next(grpo.prompts_of(trained, seed)) for seed in (0, 1))
    assert prompts == again
    assert prompts != other


def test_rows_hold_prompt_and_sample(trained: Trained) -> None:
    prompts = ["alpha", "beta gamma", ""]
    key, eos = jax.random.key(0), end_of_text(trained.tokenizer)
    # All tokens are as likely, so that some row gets an end of text.
    params = jax.tree.map(jnp.zeros_like, trained.params)
    made = sample_rows(
        trained, params, prompts, key, 12, 300, Sampling(temperature=1.0)
    )
    mask, targets = np.asarray(made.mask), np.asarray(made.batch.targets)
    inputs = np.asarray(made.batch.inputs)
    assert made.batch.positions[0].tolist() == list(range(311))
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    stopped = 0
    for row, prompt in enumerate(prompts):
        ids = trained.encode(prompt)
        assert inputs[row, : len(ids)].tolist() == ids
        first = int(np.argmax(mask[row]))
        assert first == len(ids) - 1
        tokens = targets[row][mask[row]].tolist()
        assert mask[row, first : first + len(tokens)].all()
        if eos in tokens:
            assert tokens.index(eos) == len(tokens) - 1
            stopped += 1
        else:
            assert len(tokens) == 300
        text = trained.tokenizer.decode([t for t in tokens if t != eos])
        assert made.texts[row] == text
    assert stopped


def test_a_prompt_that_is_too_long_is_refused(trained: Trained) -> None:
    with pytest.raises(TrainingError, match="more than 3"):
        sample_rows(
            trained, trained.params, ["alpha beta"], jax.random.key(0), 3, 2, GREEDY
        )


def test_scores_are_those_of_the_sampler(trained: Trained, small: None) -> None:
    policy = grpo.Policy(trained)
    prompts = ["alpha ", "beta"]
    batch, mask, _ = sample_rows(
        trained, trained.params, prompts, jax.random.key(3), 12, 6, GREEDY
    )
    found = np.asarray(policy.score(trained.params, batch, mask))
    run_model = jax.jit(hidden_and_head, static_argnums=0)
    hidden, head = run_model(trained.model, trained.params, batch, None)
    columns = trained.model.loss.vocab_size
    logits = np.asarray(hidden @ head, np.float64)[..., :columns] / grpo.TEMPERATURE
    logits -= np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    rows, places = np.nonzero(np.asarray(mask))
    expected = logits[rows, places, np.asarray(batch.targets)[rows, places]]
    np.testing.assert_allclose(found[rows, places], expected, rtol=1e-4)
    # The sampler took the likeliest, from the same distributions.
    np.testing.assert_allclose(expected, logits[rows, places].max(-1))
    assert np.all(found[~np.asarray(mask)] == 0)


def test_an_update_starts_from_ratio_one_and_follows_the_advantages(
    trained: Trained, small: None
) -> None:
    policy = grpo.Policy(trained)
    sampling = Sampling(temperature=grpo.TEMPERATURE)
    batch, mask, _ = sample_rows(
        trained, trained.params, ["alpha "] * 4, jax.random.key(0), 12, 6, sampling
    )
    before = policy.score(trained.params, batch, mask)
    advantages = jnp.array([1.0, -1.0, 1.0, -1.0])
    rollout = grpo.Rollout(batch, mask, advantages, before, before)
    _, aux = jax.jit(policy.objective)(trained.params, rollout)
    assert aux["mean_ratio"] == pytest.approx(1, abs=1e-5)
    assert aux["kl"] == pytest.approx(0, abs=1e-5)
    assert aux["clip_fraction"] == 0
    state = trained.params, grpo.OPTIMIZER.init(trained.params)
    (params, _), aux = policy.update(state, rollout, jax.random.key(1))
    gained = np.sum(np.asarray(policy.score(params, batch, mask) - before), axis=1)
    assert gained[[0, 2]].min() > gained[[1, 3]].max()
    # The mean over the steps: the later ones are off the sampling policy.
    assert aux["kl"] > 0
    assert aux["clip_fraction"] > 0


def test_the_reward_rises(
    demo_run: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(prompt: str, text: str) -> float:
        return sum(letter in "aeiou" for letter in text) / max(len(text), 1)

    monkeypatch.setattr(grpo, "reward", share)
    arguments = ["--checkpoint", str(demo_run), "--out", str(tmp_path / "out")]
    options = {"name": "grpo", "doc": grpo.__doc__, "steps": 8}
    assert run_recipe(grpo.train, arguments, **options) == 0
    records = read_records(tmp_path / "out" / "grpo.jsonl")
    rewards = [record["reward"] for record in records]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.1
    assert records[-1]["kl"] > records[0]["kl"] >= 0
    assert (tmp_path / "out" / "grpo.png").stat().st_size > 10_000
    samples = (tmp_path / "out" / "samples_0008.txt").read_text()
    assert samples.count("# reward ") == 4
    assert "\ndef " in samples


def test_a_missing_checkpoint_is_explained(
    demo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"name": "grpo", "doc": grpo.__doc__, "steps": 8}
    nowhere = ["--checkpoint", str(tmp_path / "nowhere"), "--out", str(tmp_path)]
    assert run_recipe(grpo.train, nowhere, **options) == 1
    assert "`make demo` trains one" in capsys.readouterr().err
    none = ["--checkpoint", str(demo_run), "--steps", "0"]
    assert run_recipe(grpo.train, none, **options) == 1
    assert "--steps must be at least 1" in capsys.readouterr().err
