"""The end of a session: the curves, the table, and a sample of the model's text."""

from rich.console import Console

from trainer.data.text import TextData
from trainer.decode.sample import sample_text
from trainer.files import writing
from trainer.model.language_model import LanguageModel
from trainer.report.metrics import read_records
from trainer.report.plot import plot_losses
from trainer.report.samples import keep_sample
from trainer.report.summary import say, show_paths, show_sample, show_table
from trainer.run.processes import is_first
from trainer.run.settings import Settings
from trainer.run.state import TrainState


def finish(
    settings: Settings,
    model: LanguageModel,
    state: TrainState,
    text: TextData,
    console: Console,
) -> None:
    """Draws the curves; after the run's last step also prints the table and a sample.

    Every process takes part in the sample; the first one writes and prints.
    """
    out, step = settings.out, int(state.step)
    records = read_records(out / "metrics.jsonl", "step", "seconds")
    heldout = read_records(out / "heldout.jsonl")
    if records and is_first():
        with writing(out / "losses.png"):
            plot_losses(records, heldout, out / "losses.png")
    if step < settings.steps:
        say(console, f"stopped and saved at step {step}: the same command resumes")
        return
    if records:
        show_table(console, records, heldout)
    if settings.sample_tokens:
        sample = sample_text(settings, model, state, text)
        show_sample(console, sample.text)
        if is_first():
            keep_sample(out / "samples.jsonl", sample)
    show_paths(console, out)
