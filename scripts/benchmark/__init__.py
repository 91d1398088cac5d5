"""Measures the time and memory of torch_sce and of other implementations.

    cases       what is measured: shapes, kinds of predictions, and the speed-ups we mean to reach
    peers       the implementations compared
    measuring   the time and the peak memory of calls; independent of the others
    results     measures the implementations on a case
    tf_process  the same for tf.keras, in a separate process
    report      tables for the terminal, JSON
    plots       plots as PNG files
    command     the command line, `python scripts/benchmark`

A candidate is torch_sce or a peer: a function of labels and predictions that returns the mean
loss. All candidates of a case get the same tensors and run in turn in one process; tf.keras runs
after them. "forward" is the loss under grad mode, "both" the loss and its backward pass.

Two copies of the predictions are timed with them. A copy into an existing tensor is two moves: one
read and one write. The least is one move forward, and three moves for both passes, which read
twice and write the gradient. A copy into a new tensor shows what the first touch of its pages
costs.

A linear head gets labels, what goes into it, and its weight. It is compared with its products
alone, not with copies.

A busy case is measured beside a busy process on each core, as data loaders are.
"""
