"""One fine-tuning from images to a model file: what `wsiseg finetune` calls."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsiseg.errors import ConfigError
from wsiseg.finetune.card import describe_data, write_model
from wsiseg.finetune.config import FinetuneConfig
from wsiseg.finetune.data import Dataset, read_dataset
from wsiseg.finetune.loop import train
from wsiseg.finetune.splits import require_disjoint, split
from wsiseg.models import build_network, find_weights, pick_device, read_all_tensors, read_tensors
from wsiseg.models.cards import file_hash, read_note
from wsiseg.models.registry import MODELS, NETWORKS
from wsiseg.runtime.atomic import require_free
from wsiseg.runtime.paths import kind_of
from wsiseg.runtime.settings import check_types, check_values
from wsiseg.runtime.text import read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from wsiseg.finetune.loop import Task
    from wsiseg.models.cards import ModelCard

logger = logging.getLogger(__name__)

COMPACT = MODELS["nuclei-compact"].network


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """A model that was adapted.

    Attributes
    ----------
    path
        Its file.
    before, after
        Scores on the validation images, of the parent and of this model; empty without such images.
    steps
        Steps that its weights are the result of.
    train, valid
        Images that were trained on, and that validated.
    reads_text
        It was trained with phrases.
    """

    path: Path
    before: dict[str, float]
    after: dict[str, float]
    steps: int
    train: Dataset
    valid: Dataset
    reads_text: bool


def finetune(
    data: Path,
    out: Path,
    *,
    model: str = "nuclei-compact",
    config: FinetuneConfig | None = None,
    valid: Path | None = None,
    no_valid: bool = False,
    also: Sequence[Path] = (),
    prompts: Path | None = None,
    mpp: float | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int, int, float], None] | None = None,
    on_note: Callable[[str], None] = logger.warning,
    stopped: Callable[[], bool] = lambda: False,
) -> Finetuned:
    """Adapt a model to labelled images.

    Parameters
    ----------
    data
        Folder of labelled images, slides or corrected runs (`wsiseg.finetune.data`).
    out
        Model file to write, ``.safetensors``. Beside it ``.card.json`` and, while training, a folder ``.training``.
    model
        Name or file of the parent.
    config
        Settings; defaults when absent.
    valid
        Folder of images that validate; part of ``data``, split by slide or patient, when absent.
    no_valid
        Train on all of ``data`` and validate nothing.
    also
        Folders of further images, which keep the model good at what they show.
    prompts
        JSON with phrases in addition to those of the package, for prompt groups.
    mpp
        Microns per px of the images, where they do not say.
    overwrite
        Replace ``out``, and a training that was stopped.
    on_progress
        Called with steps done, steps in all, and the loss.
    on_note
        Called with each remark on the data.
    stopped
        When it turns true, the state is saved and training ends.

    Returns
    -------
    Finetuned
        ``out`` is complete.

    Raises
    ------
    WsisegError
        Wrong input, or a loss that is not a number; ``out`` is as it was.
    InterruptedRunError
        ``stopped`` turned true; the same call continues.
    """
    config = config or FinetuneConfig()
    check_types(config, "finetune")
    check_values(config, "finetune")
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: the model is a .safetensors file; give such a name")
    require_free(out, ConfigError, overwrite=overwrite)
    card, weights = find_weights(model)
    require_objective(card, config.objective, model)
    require_used(card, config, model)
    phrased = config.objective == "prompt-group" or ("text" in card.prompts and card.network != COMPACT)
    if prompts and not phrased:
        raise ConfigError(
            f"--prompts: {model} learns no phrases with --objective {config.objective}; leave it out, or use --objective prompt-group"
        )
    sets = _read_sets(data, valid, no_valid, also, card, config, mpp, on_note)
    device = pick_device(config.device)
    folder = out.with_suffix(".training")
    if overwrite and kind_of(folder, ConfigError) == "folder":
        shutil.rmtree(folder)
    task, note = make_task(card, weights, sets, config, device, prompts)
    parent = file_hash(weights)
    state = train(
        task,
        folder,
        identity={
            "parent": parent,
            "phrases": card.phrases_sha256 if phrased else "",
            "text_encoder": (note.get("text") or {}).get("sha256", ""),
            "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "device"},
            "prompts": read_text(prompts, ConfigError) if prompts else None,
            **{name: None if part is None else part.digest() for name, part in vars(sets).items()},
        },
        seed=config.seed,
        minutes=config.minutes,
        epochs=config.epochs,
        checks=config.checks,
        patience=config.patience,
        on_progress=on_progress,
        stopped=stopped,
    )
    licence = (
        f"{card.licence} (that of {card.name}, which this model was made from; the licence of the images may add to it)"
    )
    note |= {"mpp": card.mpp, "normalise": card.normalise, "licence": licence}
    note |= {"source": f"finetuned from {card.name}, sha256 {parent}"}
    write_model(
        out,
        task.tensors(),
        note,
        {
            "parent": {"name": card.name, "sha256": parent, "licence": card.licence, "source": card.source},
            "licence": licence,
            "settings": {k: v for k, v in dataclasses.asdict(config).items() if k != "device"},
            "data": {name: describe_data(part) for name, part in vars(sets).items()},
            "steps": state.best_step,
            "before": state.before,
            "after": state.best,
        },
    )
    (folder / "state.pt").unlink(missing_ok=True)
    return Finetuned(
        path=out,
        before=state.before,
        after=state.best,
        steps=state.best_step,
        train=sets.train,
        valid=sets.valid,
        reads_text=phrased,
    )


@dataclass(frozen=True, kw_only=True)
class Sets:
    """Images by what they are for."""

    train: Dataset
    valid: Dataset
    also: Dataset | None = None


def require_objective(card: ModelCard, objective: str, model: str) -> None:
    """Refuse an objective that the model has no prompts for.

    Raises
    ------
    ConfigError
        With those that it can be adapted with.
    """
    possible = {
        COMPACT: ("supervised", "prompt-group"),
        NETWORKS["sam"]: ("supervised", "sampo"),
        NETWORKS["sam3"]: ("supervised", "prompt-group") if "text" in card.prompts else (),
    }.get(card.network, ())
    if objective not in possible:
        how = f"with --objective {' or '.join(possible)}" if possible else "here by no objective"
        raise ConfigError(f"--objective {objective}: {model} can be adapted {how}")


def require_used(card: ModelCard, config: FinetuneConfig, model: str) -> None:
    """Refuse settings that this training would not use.

    Raises
    ------
    ConfigError
        One was changed.
    """
    compact, default = card.network == COMPACT, FinetuneConfig()
    outlines = compact and config.objective == "supervised"
    used = {
        "keep": (outlines, "nuclei-compact with --objective supervised"),
        "lora_rank": (not compact, "SAM and SAM 3"),
        "precision": (not compact or outlines, "--objective supervised, SAM and SAM 3"),
        "intent": (not outlines, "--objective sampo and prompt-group, SAM and SAM 3"),
        "prompts_per_step": (not outlines, "--objective sampo and prompt-group, SAM and SAM 3"),
        "text_encoder": (compact and not outlines, "nuclei-compact with --objective prompt-group"),
        "reading": (config.objective == "sampo", "--objective sampo"),
        "preference": (config.objective == "sampo", "--objective sampo"),
        "input_px": (card.network == NETWORKS["sam"], "SAM"),
    }
    for name, (here, where) in used.items():
        if not here and getattr(config, name) != getattr(default, name):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{option}: not used by {model} with --objective {config.objective}, only by {where}; leave it out"
            )


def make_task(
    card: ModelCard, weights: Path, sets: Sets, config: FinetuneConfig, device: torch.device, prompts: Path | None
) -> tuple[Task, dict[str, Any]]:
    """The task of a model, and what its file must say besides scale and licence.

    Raises
    ------
    ConfigError
        The images lack what the objective needs.
    WeightsError
        The weights are not the network's.
    """
    if card.network == COMPACT and config.objective == "supervised":
        from wsiseg.finetune.compact_task import CompactTask
        from wsiseg.models.phrases import PREFIX

        # Phrases were learned on the features that change now.
        tensors = {name: value for name, value in read_tensors(weights).items() if not name.startswith(PREFIX)}
        return CompactTask(tensors, sets.train, sets.valid, sets.also, config, device), {"network": "nuclei-compact"}
    if card.network == NETWORKS["sam"]:
        from wsiseg.finetune.sam_task import SamTask

        return SamTask(read_tensors(weights), sets.train, sets.valid, sets.also, config, device), {"network": "sam"}
    from wsiseg.finetune.phrase_networks import CompactPhrases, Sam3Phrases
    from wsiseg.finetune.prompts import read_prompt_bank
    from wsiseg.finetune.text_task import TextTask

    bank = read_prompt_bank(prompts)
    if card.network == COMPACT:
        compact = CompactPhrases(read_all_tensors(card, weights), card, config, device)
        task = TextTask(compact, sets.train, sets.valid, sets.also, bank, config, device)
        text = compact.card(task.phrases, task.types)
        note = {"network": "nuclei-compact", "prompts": ["points", "boxes", "text"], "text": dataclasses.asdict(text)}
        return task, note
    detector = Sam3Phrases(build_network(card, weights), config, device)
    return TextTask(detector, sets.train, sets.valid, sets.also, bank, config, device), read_note(weights) or {}


def _read_sets(
    data: Path,
    valid: Path | None,
    no_valid: bool,
    also: Sequence[Path],
    card: ModelCard,
    config: FinetuneConfig,
    mpp: float | None,
    on_note: Callable[[str], None],
) -> Sets:
    """All images, each set with the same types."""
    new = read_dataset(data, model_mpp=card.mpp, mpp=mpp)
    names = new.type_names
    if no_valid:
        trained, held = new, dataclasses.replace(new, images=())
    elif valid is not None:
        trained, held = new, read_dataset(valid, model_mpp=card.mpp, mpp=mpp).with_types(names)
    else:
        trained, held = split(new, config.valid_share, config.seed)
    require_disjoint(trained, held)
    further = [read_dataset(folder, model_mpp=card.mpp, mpp=mpp).with_types(names) for folder in also]
    for part in further:
        require_disjoint(part, held)
    more = (
        dataclasses.replace(further[0], images=tuple(i for part in further for i in part.images)) if further else None
    )
    for note in dict.fromkeys(note for part in (new, held, *further) for note in part.notes):
        on_note(note)
    return Sets(train=trained, valid=held, also=more)
