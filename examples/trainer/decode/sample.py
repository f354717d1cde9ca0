"""The sample at the end of a run: the prompt, continued by the model."""

import jax
import numpy as np

from trainer.data.text import TextData
from trainer.decode.decoder import Sampling, generate
from trainer.model.language_model import LanguageModel
from trainer.model.temperature import fold_own_temperature
from trainer.report.samples import Sample
from trainer.run.evaluate import routing_bias
from trainer.run.settings import Settings
from trainer.run.state import TrainState

# Label smoothing spreads mass over all tokens; these are the ones that matter.
CANDIDATES = 40


def sample_text(
    settings: Settings, model: LanguageModel, state: TrainState, text: TextData
) -> Sample:
    """Returns the prompt of the settings, continued by the model."""
    step, prompt = int(state.step), settings.prompt
    ids = [text.eos, *text.tokenizer.encode(prompt).ids]
    count = min(settings.sequence_length - len(ids), settings.sample_tokens)
    if count < 1:
        return Sample(step, prompt, prompt)
    model, params = fold_own_temperature(model, state.params, state.loss)
    made = generate(
        model,
        params,
        routing_bias(state.loss),
        np.array([ids], np.int32),
        np.array([len(ids)], np.int32),
        jax.random.key(settings.seed),
        count=count,
        sampling=Sampling(temperature=1.0, top_k=CANDIDATES),
    )
    tokens = [*ids[1:], *np.asarray(made)[0].tolist()]
    return Sample(step, prompt, text.tokenizer.decode(tokens))
