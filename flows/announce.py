"""Announces checkpoints, so that a watch takes them at once instead of at its next look.

    announce("my-run", step, folder)                        # any training loop, after the checkpoint is saved
    Trainer(..., callbacks=[AnnounceCheckpoints("my-run")])    # transformers

It sends the event `checkpoint.created` to the Prefect API that PREFECT_API_URL names. That is a nudge and no more: whoever watches finds the checkpoint
by looking too. So nothing here may harm a training: without an API, or with one that does not answer, an announcement is over within seconds, says
so in the log, and raises nothing.

The event's id follows from run and step: announced twice (a training that was resumed), it counts once.
"""

import logging
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect.client.orchestration import get_client
from prefect.events import Event, Resource
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings, temporary_settings
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flows.names import CHECKPOINT, training

__all__ = ["AnnounceCheckpoints", "announce", "event_id"]

log = logging.getLogger("stagediff")

SECONDS = 5.0
"""Longest wait for the API's answer."""


def event_id(run: str, step: int) -> UUID:
    return uuid5(NAMESPACE_URL, f"{training(run)}/{step}")


def announce(run: str, step: int, uri: str | Path, seconds: float = SECONDS) -> bool:
    """Says that a training's checkpoint is saved, and whether anybody heard.

    Parameters
    ----------
    run
        The training's name, as in the config's `watch.run` (default there: the config's name).
    uri
        Where it is, for people: the watch looks where its config says.
    seconds
        How long the API may take.
    """
    try:
        if not get_current_settings().api.url:
            log.debug("checkpoint %d of %s is not announced: PREFECT_API_URL is not set", step, run)
            return False
        body = Event(
            event=CHECKPOINT,
            id=event_id(run, step),
            resource=Resource({"prefect.resource.id": training(run), "prefect.resource.name": run}),
            payload={"run": run, "step": int(step), "uri": str(uri)},
        )
        # once: who waits for an API that does not answer is the training
        once = temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0})
        with once, get_client(sync_client=True, httpx_settings={"timeout": seconds}) as client:
            client.request("POST", "/events", json=[body.model_dump(mode="json")]).raise_for_status()
    except Exception as error:  # whatever it is, the training goes on
        log.warning(
            "checkpoint %s of %s could not be announced (%s: %s); it is found at the next look", step, run, type(error).__name__, error
        )
        return False
    return True


class AnnounceCheckpoints(TrainerCallback):
    """Announces every checkpoint that the Trainer has saved, from the first process only."""

    def __init__(self, run: str, seconds: float = SECONDS):
        self.run, self.seconds = run, seconds

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)).absolute() / f"checkpoint-{state.global_step}"
            announce(self.run, state.global_step, folder, self.seconds)
