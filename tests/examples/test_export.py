"""The command that exports a model for decoding at temperature 1."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from run_helpers import checkpoint, train
from tokenizers import Tokenizer

from export import main
from trainer.decode.decoder import Decoder
from trainer.model.language_model import hidden_and_head
from trainer.model.layers import Batch
from trainer.run.trained import load

FLAGS = ("--loss.initial-temperature", "0.7", "--loss.logit-soft-cap", "3")


@pytest.fixture(scope="module")
def run(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with experts, at another temperature than 1."""
    sizes = ("--model.dense-layers", "0")
    out = tmp_path_factory.mktemp("run")
    # Optax's Adam raises a Python float to an int32 power, which strict refuses.
    with jax.numpy_dtype_promotion("standard"):
        train(tiny, out, "--preset", "moe", "--steps", "3", *sizes, *FLAGS)
    return out


def read(folder: Path) -> tuple[dict[str, Any], Any]:
    description = json.loads((folder / "model.json").read_text())
    with ocp.StandardCheckpointer() as checkpointer:
        return description, checkpointer.restore((folder / "params").resolve())


def test_the_exported_model_is_the_trained_one_at_temperature_one(
    run, tmp_path, capsys
):
    folder = tmp_path / "a" / "exported"
    assert main([str(run), str(folder)]) == 0
    assert "step 3, temperature 0.7 folded into lm_head" in capsys.readouterr().out
    description, arrays = read(folder)
    assert description["temperature_folded_in"] == pytest.approx(0.7)
    assert description["logit_soft_cap"] == pytest.approx(3 / 0.7)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == 288
    trained, tokens = load(run), jnp.arange(8, dtype=jnp.int32)[None]
    batch = Batch(tokens, tokens, jnp.ones_like(tokens), tokens)
    run_model = jax.jit(hidden_and_head, static_argnums=0)
    hidden, _ = run_model(
        trained.model, arrays["params"], batch, arrays["routing_bias"]
    )

    def logits(lm_head: Any, cap: float) -> Any:
        z = hidden @ lm_head[:, : description["vocab_size"]]
        return cap * np.tanh(z / cap)

    found = logits(arrays["params"]["lm_head"], description["logit_soft_cap"])
    # From the checkpoint, where the temperature comes last.
    state: Any = checkpoint(run, 3)[0]
    want = logits(state["params"]["lm_head"], 3) / 0.7
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    decoded = Decoder(trained.model).logits(trained.params, hidden)
    np.testing.assert_allclose(decoded, want, rtol=1e-5, atol=1e-6)


def test_a_folder_that_is_there_is_left_alone(run, tmp_path, capsys):
    assert main([str(run), str(tmp_path)]) == 1
    assert "is there already: name another folder" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), str(tmp_path / "new")]) == 1
    assert not (tmp_path / "new").exists()
