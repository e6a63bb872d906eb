"""What every worker runs: the same loop on a laptop's CPU and on a cluster's GPUs.

Weights, order and views are pure functions of (seed, step), so a run that was stopped anywhere and is started again
continues as if nothing had happened: on CPU to the last bit.
"""

import json
from contextlib import AbstractContextManager, nullcontext

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from isd_ray.config import Config
from isd_ray.data.augment import make_views
from isd_ray.data.plan import whole_size
from isd_ray.data.stream import Batch, Stream
from isd_ray.errors import UserError
from isd_ray.train.folder import RunFolder, load_checkpoint, read_table, save_checkpoint
from isd_ray.train.log import Log
from isd_ray.train.optim import learning_rates, set_rate, teacher_momenta
from isd_ray.train.parts import Clock
from isd_ray.train.state import State, Worker, build_state, step_seed
from isd_ray.train.validation import Watch


def train(config: Config, folder: RunFolder, worker: Worker) -> None:
    """Train to the last epoch, from the newest checkpoint of the run where there is one."""
    torch.use_deterministic_algorithms(config.train.deterministic and worker.device.type == "cpu")
    stream = build_stream(config, folder, worker)
    state = build_state(config, worker.device, stream.table.num_rows)
    saved = load_checkpoint(folder)
    if saved:
        state.load(saved)
    try:
        run_epochs(config, folder, worker, stream, state)
    except UserError:
        write_bad_samples(folder, [stream.bad])  # the others are stopped: what this rank knows must do
        raise
    bad = gather_bad(worker, stream)
    if worker.rank == 0:
        write_bad_samples(folder, bad)


def build_stream(config: Config, folder: RunFolder, worker: Worker) -> Stream:
    """Open the stream of batches over the run's chosen rows, for this rank."""
    table = read_table(folder, "selection.parquet")
    return Stream(
        table,
        seed=config.train.seed,
        global_batch=config.train.batch_size,
        size=config.data.image_size,
        views=config.method.views,
        rank=worker.rank,
        world=worker.world,
        cache=config.data.cache,
        device=worker.device,
        finish=finish_in_tasks(config, table, worker.device),
        max_bad=config.data.max_bad,
    )


def finish_in_tasks(config: Config, table: pa.Table, device: torch.device) -> bool:
    """Tell whether reading tasks make the whole views: by what is fixed for a run, since it rounds them."""
    where = config.data.augment_on
    if where == "auto":
        return device.type == "cpu" and whole_size(table, config.data.image_size) is None
    return where == "tasks"


def run_epochs(config: Config, folder: RunFolder, worker: Worker, stream: Stream, state: State) -> None:
    """The loop itself, from `state.step` to the end, or to where it is told to stop."""
    total = config.train.epochs * stream.steps
    rates = learning_rates(config.train, stream.steps)
    momenta = teacher_momenta(config.method.momentum, config.method.momentum_schedule, total)
    model = distribute(state, config, worker)
    clock = Clock(worker.device)
    clock.watch_queue(state.bank if state.queue is None else state.queue)
    if worker.world > 1:
        clock.watch_gradients(state.method.encoders()["student"])
    with Log(config, folder, worker, stream, state.step, clock) as log:
        watch = Watch(config, folder, worker, stream.steps, state.step)
        while state.step < total and not watch.stop:
            epoch, start = divmod(state.step, stream.steps)
            if start == 0:
                state.method.begin_epoch(epoch)
                clock.mark("queue")  # clusters of what is remembered, where the method has any
            for batch in stream.epoch(epoch, start=start):
                clock.mark("wait")
                rate, due = float(rates[state.step]), log.due(state.step + 1)
                set_rate(state.optimizer, rate, config.train.lr)
                state.method.update_teacher(float(momenta[state.step]))
                clock.mark("update")
                loss, diagnostics = train_step(model, state, batch, config, worker, clock, due)
                log.add(loss)
                if due:
                    timed, watched = log.reduce(state.step, rate, diagnostics), watch(state)
                    if watched and worker.rank == 0:
                        log.measured(watch.rows[-1])
                    if timed or watched or state.step == total:
                        save(config, folder, worker, state)
                        log.was_saved()
                clock.mark("log")


def train_step(
    model: nn.Module,
    state: State,
    batch: Batch,
    config: Config,
    worker: Worker,
    clock: Clock,
    diagnose: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimiser step on this rank's columns of the global batch.

    Returns this rank's share of the mean loss over the global batch (the shares of all ranks sum to it) and the
    diagnostics. Ranks may hold unequal numbers of rows: each weights its mean so that DDP's mean over ranks is the
    gradient of the mean over the global batch.
    """
    torch.manual_seed(step_seed(config.train.seed, state.step, worker.rank))
    data = config.data
    views = make_views(batch, config.method.views, data.image_size, data.mean, data.std, worker.device)
    views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    clock.mark("views")
    index, label = batch.index.to(worker.device), batch.label.to(worker.device)
    loss, diagnostics = torch.zeros((), device=worker.device), {}
    parts = torch.arange(len(index)).tensor_split(config.train.accumulate)  # equally many on every rank
    for part in parts:
        rows, last = slice(int(part[0]), int(part[-1]) + 1), part is parts[-1]
        share = len(index[rows]) / config.train.batch_size
        with nullcontext() if last else no_sync(model), autocast(config, worker.device):
            output = model([view[rows] for view in views], index[rows], label[rows], diagnose and last)
            clock.mark("forward")
            (output.loss * (share * worker.world)).backward()
        clock.mark("communicate" if last and worker.world > 1 else "backward")
        loss += output.loss.detach() * share
        diagnostics = output.diagnostics
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    clock.mark("update")
    return loss, diagnostics


def distribute(state: State, config: Config, worker: Worker) -> nn.Module:
    """Compile the backbones where asked and wrap the method for gradient averaging over the workers.

    Buffers stay each rank's own: batch-norm statistics are local, as in the published multi-GPU runs.
    """
    state.method.train()
    if config.train.compile:
        for encoder in state.method.encoders().values():
            encoder.compile()
    if worker.world == 1:
        return state.method
    devices = [worker.device.index] if worker.device.type == "cuda" else None
    return DistributedDataParallel(
        state.method, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def no_sync(model: nn.Module) -> AbstractContextManager:
    """Leave the gradients of this part of the batch on the rank; the last part's backward averages them all."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    """bfloat16 where it is asked for, or on CUDA by default; on CPUs it was measured with AMX alone."""
    wanted = config.train.precision
    enabled = wanted == "bfloat16" or (wanted == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def save(config: Config, folder: RunFolder, worker: Worker, state: State) -> None:
    """Save a checkpoint; one with weights that are not finite is refused, so the last good one is kept."""
    saved = state.save()
    if not all(torch.isfinite(p).all() for p in state.method.parameters()):
        raise UserError(f"the weights are not finite after step {state.step}; lower --train.lr")
    if worker.rank == 0:
        save_checkpoint(folder, saved, config.train.keep_checkpoints)


def gather_bad(worker: Worker, stream: Stream) -> list[list[dict]]:
    """Return the lists of unreadable images of all ranks."""
    if worker.world == 1:
        return [stream.bad]
    lists: list[list[dict]] = [[] for _ in range(worker.world)]
    dist.all_gather_object(lists, stream.bad)
    return lists


def write_bad_samples(folder: RunFolder, lists: list[list[dict]]) -> None:
    """Write the images that could not be read, one JSON object a line; no file when there is none."""
    lines = sorted({json.dumps(sample, sort_keys=True) for samples in lists for sample in samples})
    if lines:
        folder.write("bad_samples.jsonl", ("\n".join(lines) + "\n").encode())
