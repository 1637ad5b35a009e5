"""Compile passes: small rewrites of an exported network, one file each.

Every pass is a function ``GraphModule -> PassReport`` that changes the graph in place and keeps
what it computes (up to the tolerance its docstring states). Nodes carry three things in ``meta``:

    val      the fake tensor (shape, dtype, strides) the node computes
    weight   on placeholders: the qualified name of the parameter, buffer or constant
    stage    "weights", "time" or "main": what it depends on, hence when it runs (`stages`)
"""
