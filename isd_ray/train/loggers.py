"""Numbers of a run where people look at them: TensorBoard in its folder, Weights & Biases, MLflow.

All get the rows of the log, what is measured on the way, and the final result. A tracker that
fails while a run goes on is left out with a line; it never ends a training.
"""

import hashlib
import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from isd_ray.config import Config, flatten
from isd_ray.data.files import path_of
from isd_ray.errors import UserError, harmless
from isd_ray.train.folder import RunFolder, checkpoint_names

Numbers = Mapping[str, Any]
PARTS, MOST = 4, 60  # parts of a run's place, and characters, that its id in a tracker shows


class Logger:
    """One place where numbers go."""

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take finite numbers of a step; steps only grow, but for a run that continues."""
        raise NotImplementedError

    def flush(self) -> None:
        """Make visible what was taken, where that does not happen by itself."""

    def finish(self, failed: bool = False) -> None:
        """End this process's part; whoever opens the same run later continues it."""
        raise NotImplementedError


class Loggers:
    """All places of a run. `out`: where it is said that one of them fails."""

    def __init__(self, places: dict[str, Logger], out: TextIO) -> None:
        self.places, self.out = places, out

    def row(self, step: int, numbers: Numbers, group: str = "") -> None:
        """Send the numbers among `numbers`; `group`: what names begin with, as validation/."""
        kept = {group + name: float(x) for name, x in numbers.items() if _is_number(x)}
        self._each(lambda logger: logger.row(step, kept))

    def flush(self) -> None:
        """Make visible what was sent, as with a checkpoint."""
        self._each(lambda logger: logger.flush())

    def finish(self, failed: bool = False) -> None:
        """End this process's part. Safe to call twice."""
        self._each(lambda logger: logger.finish(failed))
        self.places = {}

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self.places.items()):
            try:
                call(logger)
            except Exception as error:  # of somebody else's package: a training does not end for it
                del self.places[name]
                _note(f"{name} fails and gets nothing more ({_said(error)})", self.out)


def open_loggers(config: Config, folder: RunFolder, out: TextIO, step: int = 0) -> Loggers:
    """Open TensorBoard, where the folder is a local one, and the trackers of `--train.loggers`.

    step: from which the run goes on; TensorBoard forgets later ones. Where trackers send to is
    their own business: WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI ... A run that continues is
    continued there too. Raises UserError where one is not installed or does not start.
    """
    places: dict[str, Logger] = {}
    if folder.local:
        places["TensorBoard"] = _TensorBoard(f"{folder.path}/tensorboard", step)
    elif step == 0:
        _note("TensorBoard's files are for local folders alone; metrics.jsonl has the numbers", out)
    options = flatten(config.model_dump())
    for name in config.train.loggers:
        package, kind = _load(name), {"wandb": _WandB, "mlflow": _MLflow}[name]
        try:
            places[name] = kind(package, folder.uri, options)
        except Exception as error:
            raise UserError(
                f"--train.loggers {name}: it does not start ({_said(error)}); log in, or set its "
                "environment variables (WANDB_MODE=offline, MLFLOW_TRACKING_URI), or leave it out"
            ) from None
    return Loggers(places, out)


def send_result(config: Config, folder: RunFolder, result: Mapping[str, Any], out: TextIO) -> None:
    """Send the accuracies of result.json, also of groups, as result/NETWORK.METRIC.GROUP."""
    numbers: dict[str, Any] = {}
    for network, metrics in result.get("metrics", {}).items():
        for metric, accuracy in metrics.items():
            groups = (result.get("groups", {}).get(network) or {}).get(metric) or {}
            numbers[f"{network}.{metric}"] = accuracy
            numbers |= {f"{network}.{metric}.{group}": value for group, value in groups.items()}
    if not numbers:
        return
    step = int(re.findall(r"\d+", checkpoint_names(folder)[-1])[0])
    try:
        loggers = open_loggers(config, folder, out, step)
    except UserError as error:  # the run is finished, and its result is written
        _note(f"the result is not sent: {error}", out)
        return
    loggers.row(step, numbers, "result/")
    loggers.finish()


def run_name(uri: str) -> str:
    """Return the last parts of a run's place, a trial's sweep and a cell's study among them."""
    return "/".join(path_of(uri).strip("/").split("/")[-PARTS:])


def run_id(uri: str) -> str:
    """Return what a tracker knows a run by: the same for the same place, and for no other."""
    readable = re.sub(r"[^A-Za-z0-9._]+", "-", run_name(uri))[-MOST:].strip("-")
    return f"{readable}-{hashlib.sha256(uri.encode()).hexdigest()[:10]}"


def install_hint(name: str) -> str:
    """Return what to do where a tracker is not installed."""
    remedy = f"pip install {name} (on every node), or leave it out"
    return f"--train.loggers {name}: it is not installed; {remedy}"


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(install_hint(name)) from None


def _note(text: str, out: TextIO) -> None:
    print(f"note: {text}", file=out, flush=True)


def _said(error: Exception) -> str:
    return harmless(str(error) or type(error).__name__, 200)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _TensorBoard(Logger):
    def __init__(self, folder: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.writer: Any = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def finish(self, failed: bool = False) -> None:
        self.writer.close()


class _WandB(Logger):
    def __init__(self, wandb: Any, uri: str, options: Mapping[str, Any]) -> None:
        name, own = run_name(uri), run_id(uri)
        self.run = wandb.init(name=name, id=own, resume="allow", config=dict(options))

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def finish(self, failed: bool = False) -> None:
        self.run.finish(exit_code=int(failed))


class _MLflow(Logger):
    """MLflow gives runs ids of its own; a tag has ours."""

    def __init__(self, mlflow: Any, uri: str, options: Mapping[str, Any]) -> None:
        self.mlflow, own = mlflow, run_id(uri)
        wanted = f"tags.`isd_ray.run` = '{own}'"
        known = mlflow.search_runs(filter_string=wanted, max_results=1, output_format="list")
        if known:  # its options stay those that it was started with
            mlflow.start_run(run_id=known[0].info.run_id)
            return
        mlflow.start_run(run_name=run_name(uri), tags={"isd_ray.run": own})
        mlflow.log_params(dict(options))

    def row(self, step: int, numbers: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(numbers), step=step)

    def finish(self, failed: bool = False) -> None:
        self.mlflow.end_run("FAILED" if failed else "FINISHED")
