"""Compile passes: small rewrites of a network's graph, one file each; `pass_order` lists them.

Every pass is a function ``(GraphModule, PassContext) -> PassReport`` of its file's name, which
changes the graph in place and keeps what it computes (up to the tolerance its docstring states).
Nodes carry four things in ``meta``:

    val      the fake tensor (shape, dtype, strides) the node computes
    weight   on placeholders: the qualified name of the parameter, buffer or constant
    stage    "weights", "time" or "main": what it depends on, hence when it runs (`stages`)
    made_by  the name of the pass that wrote the node, not there on the model's own
"""
