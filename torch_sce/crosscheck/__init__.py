"""The proof: random cases, answered by the real tf.keras and by us, and compared.

    cases         what a case is
    draw          makes them at random: a seed and a number give the same case every time
    bits          the random numbers it uses, the same on every machine
    answers       an answer, and our own answer to a case
    live          runs tf.keras, or another Keras, in a separate process (worker)
    recorded      tf.keras's recorded answers, for machines without TensorFlow
    reference     tf.keras's rules in float64: the right answer; reference_metrics: of metrics
    heads         the same, with bounds, of a loss with a linear head
    bounds        how far rounding may carry an answer from it
    differences   the rows in which we differ from tf.keras on purpose
    compare       judges a case: agrees, differs on purpose, or mismatch
    tally         the results of many cases, added up
    profiles      for which Keras: what is drawn, the rules in float64, the differences
                  (draw_keras2, reference_keras2, differences_keras2)
    campaign      compares them, here or in several processes
    results       the results as tables and sentences, and their JSON file
    report        shows it in the terminal and as HTML (page, plots, templates)
    command       the command line, `python -m torch_sce.crosscheck`

    batch         the same for a single batch of the user's, `... batch FILE.npz`
    blocks        judges a large batch, some of its rows at a time
    rules         from F.cross_entropy to Keras's loss, one rule at a time

Nothing else in the package imports this one.
"""
