"""Compute once per timestep what depends on nothing but the timestep.

    t ──► sinusoid ──► MLP ──► a projection per block        every evaluation
    table[row of t]                                          one gather

In a U-Net of DDPM that is the embedding and the projections of all residual blocks. The marked
nodes become a function of their own, ``t [N] -> (e_1 [N, ...], ..., e_k [N, ...])``; where row n of
each result depends on t[n] alone, which the table checks by value, the results for one timestep are
one row of it (`timetable.TimeTable`). Exact for a row computed with the same batch size.
"""

from __future__ import annotations

from torch.fx import GraphModule

from stepfuse.engine.compile.graph import PassContext, PassReport, is_tensor, stage, value
from stepfuse.engine.compile.stages import assign, time_frontier


def hoist_timestep(gm: GraphModule, context: PassContext) -> PassReport:
    """Mark the nodes that depend on the timestep and on weights, but on no other input."""
    report, time = PassReport("hoist_timestep"), context.time
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    if time is None or value(time).dim() != 1:
        report.note = "no timestep [N] as the second argument"
        report.candidates = 0
        return report
    time.meta["stage"] = "time"
    assign(gm)
    hoisted = [node for node in nodes if stage(node) == "time"]
    frontier = time_frontier(gm)
    count = value(time).shape[0]
    wrong = [n for n in frontier if not is_tensor(n) or value(n).shape[:1] != (count,)]
    if len({value(n).dtype for n in frontier if is_tensor(n)}) > 1:
        wrong = frontier  # one table has one dtype
    if not frontier or wrong:
        time.meta["stage"] = "main"
        assign(gm)
        report.left["results are not rows of one dtype, one per sample"] += len(wrong)
        report.candidates = len(hoisted)
        return report
    report.matched = report.candidates = len(hoisted)
    width = sum(value(n)[0].numel() for n in frontier)
    report.note = f"of {len(nodes)} nodes in all; {len(frontier)} results, {width} numbers a row"
    return report
