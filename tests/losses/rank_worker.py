"""One data-parallel rank: `python rank_worker.py RANK WORLD FOLDER` reads inputs.pt, writes rankN.pt."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

import crd_fast


def losses(inputs, configs, start, stop, process_group=None):
    """(summed loss, gradient, implicit reward) of samples start..stop-1 under every configuration."""
    results = []
    for settings in configs:
        rows = {name: tensor[start:stop] for name, tensor in inputs.items()}
        f = rows.pop("f_theta").requires_grad_()
        config = crd_fast.CRDConfig(**settings)
        out = crd_fast.loss(f, rows.pop("target"), **rows, process_group=process_group, config=config)
        out.loss.sum().backward()
        results.append((out.loss.detach().sum(), f.grad, out.implicit_reward))
    return results


def losses_in_parts(inputs, configs, start, stop, process_group):
    """`losses`, one sample a call, with the members of every rank's calls."""
    results = []
    for settings in configs:
        rows = {name: tensor[start:stop] for name, tensor in inputs.items()}
        f, ref = rows.pop("f_theta").requires_grad_(), rows.pop("ref")
        config = crd_fast.CRDConfig(**settings)
        parts = [{name: tensor[i : i + 1] for name, tensor in rows.items()} for i in range(stop - start)]
        members = crd_fast.GroupMembers.cat(
            [
                crd_fast.group_members(f[i : i + 1], **part, process_group=process_group, config=config)
                for i, part in enumerate(parts)
            ]
        )
        loss, implicit = 0.0, []
        for i, part in enumerate(parts):
            out = crd_fast.loss(f[i : i + 1], **part, ref=ref[i : i + 1], members=members, config=config)
            out.loss.sum().backward()
            loss = loss + out.loss.detach().sum()
            implicit.append(out.implicit_reward)
        results.append((loss, f.grad, torch.cat(implicit)))
    return results


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    first_alone = dist.new_group([0])
    given = torch.load(folder / "inputs.pt")
    batch = len(given["inputs"]["f_theta"]) // world
    answer = {"together": losses(**given, start=rank * batch, stop=(rank + 1) * batch, process_group=dist.group.WORLD)}
    parts = {"start": rank * batch, "stop": (rank + 1) * batch, "process_group": dist.group.WORLD}
    answer["in_parts"] = losses_in_parts(**given, **parts)
    if rank == 0:
        answer["alone"] = losses(**given, start=0, stop=batch, process_group=first_alone)
    # the second rank has one sample more, the first one less
    start, stop = rank * batch - (rank == 1), (rank + 1) * batch - (rank == 0)
    try:
        losses(**given, start=start, stop=stop, process_group=dist.group.WORLD)
    except ValueError as error:
        answer["unequal"] = str(error)
    torch.save(answer, folder / f"rank{rank}.pt")
    dist.barrier()  # no rank takes its connections down while another still uses them
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # The answer is written and the group is gone. At the interpreter's exit a library's thread, still joinable, has
    # been seen to abort the process ("terminate called without an active exception"), which says nothing of the loss.
    sys.stderr.flush()
    os._exit(0)
