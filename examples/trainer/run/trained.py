"""Loads the model of a run from a checkpoint."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from jaxtyping import Array, Float
from tokenizers import Tokenizer

import ava_jax
from trainer.data.corpus import load_corpus
from trainer.data.text import TextData, end_of_text, load_tokenizer, prepare_data
from trainer.errors import TrainingError
from trainer.model.language_model import LanguageModel
from trainer.model.layers import ModelConfig
from trainer.model.temperature import fold_own_temperature, own_temperature
from trainer.report.run_files import read_run
from trainer.run.checkpoint import Checkpoints
from trainer.run.evaluate import routing_bias
from trainer.run.folder import refuse_other_data
from trainer.run.settings import Settings
from trainer.run.state import init_state, make_model


class Trained(NamedTuple):
    """The model of a run, with its tokenizer.

    Its distribution is `softmax` of its logits: the temperature that it was trained at
    is folded into the parameters.

    Attributes:
      model: the model.
      params: its parameters.
      bias: of the routers.
      tokenizer: of the run.
      step: of the checkpoint.
      settings: of the run.
      temperature: that was folded in.
    """

    model: LanguageModel
    params: optax.Params
    bias: Float[Array, "L E"] | None
    tokenizer: Tokenizer
    step: int
    settings: Settings
    temperature: float

    @property
    def length(self) -> int:
        """Tokens of the rows that it was trained on."""
        return self.settings.sequence_length

    def encode(self, prompt: str) -> list[int]:
        """Returns the prompt's tokens after an end of text, as in training."""
        return [end_of_text(self.tokenizer), *self.tokenizer.encode(prompt).ids]


def load(folder: Path, step: int | None = None) -> Trained:
    """Loads a run's checkpoint, by default the newest.

    Raises:
      TrainingError: there is no run or no such checkpoint, or it is corrupt.
    """
    config = read_run(folder).config
    settings, loss = _rebuild(folder, config["settings"], config["loss"])
    model = make_model(settings, loss)
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep)
    steps = checkpoints.steps()
    if not steps:
        raise TrainingError(f"{folder} has no checkpoint yet: train it longer")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise TrainingError(
            f"{folder} has no checkpoint of step {step}, but of {known}"
        )
    chosen = steps[-1] if step is None else step
    loss_fn = ava_jax.unified_loss(model.loss)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: x.update(sharding=here),
        init_state.eval_shape(settings, model, loss_fn),
    )
    state, _ = checkpoints.restore(chosen, shapes)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    bias = routing_bias(state.loss)
    temperature = own_temperature(model.loss, state.loss)
    model, params = fold_own_temperature(model, state.params, state.loss)
    return Trained(model, params, bias, tokenizer, chosen, settings, temperature)


def load_text(
    folder: Path, settings: Settings, *, data: Path | None, cache: Path
) -> TextData:
    """Reads the text of a run, cut into the same rows for training and evaluation.

    A run's record may come from anyone, so it does not decide what is read and where is
    written: the user does.

    Args:
      folder: of the run.
      settings: of the run, or of another one on its text.
      data: the text; None for the standard library.
      cache: folder for its tokens.

    Raises:
      TrainingError: it cannot be read, or is not that of the run.
    """
    if data is None and settings.data is not None:
        raise TrainingError(
            f"{folder} says that it was trained on {settings.data}, which is not read "
            f"unless you say so: pass --data {settings.data}"
        )
    corpus = load_corpus(data)
    refuse_other_data(folder, corpus)
    return prepare_data(
        corpus,
        cache,
        settings.vocab_size,
        settings.sequence_length,
        settings.heldout,
    )


def _rebuild(
    folder: Path, settings: object, loss: object
) -> tuple[Settings, ava_jax.UnifiedLossConfig]:
    """Rebuilds settings and loss from `config.json`."""
    try:
        fields = dict(settings) if isinstance(settings, dict) else {}
        fields["model"] = ModelConfig(**fields["model"])
        for name in ("out", "cache", "data", "loss_config"):
            fields[name] = None if fields[name] is None else Path(fields[name])
        names = {field.name for field in dataclasses.fields(Settings)}
        kept = {k: v for k, v in fields.items() if k in names}
        config = ava_jax.UnifiedLossConfig(**loss) if isinstance(loss, dict) else None
        if config is not None:
            return Settings(**kept), config
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{folder / 'config.json'} is of another version of the trainer: {error}"
        ) from error
    raise TrainingError(f"{folder / 'config.json'} has no loss")
