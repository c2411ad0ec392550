"""What a rank tells the others of each row, where the classes are spread over ranks: one number for each field.

Of the logits that it has, z, with target masses b and probabilities q (of a class index: 1 at that class):

    m       max z                                s       sum exp(z - m)
    mass    sum b                                dot     sum b (z - m)

and where statistics are wanted

    spread  sum exp(z - m) (z - m)               total   sum q
    cross   sum q (z - m)                        best    c + C of the first class c of C whose z is m, or c where it is
                                                         NaN, as the bits of an integer: the least of all ranks wins

m of no logits, or of none but -inf, is -inf, and z - m is then z. Summaries of parts of a row merge as those of the
parts of a row on one device do (kernels/math.py). After these come what only some calls need, see `fields_of`.
"""

BASE = ("m", "s", "mass", "dot")
OF_STATS = ("spread", "total", "cross", "best")


def base_of(problem):
    """The fields that the rows' logits come to."""
    return BASE + OF_STATS if problem.stats else BASE


def fields_of(problem, has_weight):
    """All fields: with the weight of the row's class, and of probabilities the largest and its class."""
    fields = base_of(problem)
    if has_weight and not problem.probabilities:
        fields += ("weight",)
    # An implementation is asked for the class that is predicted even where only `correct` is wanted.
    if problem.probabilities and not {"predicted", "correct"}.isdisjoint(problem.stats):
        fields += ("most", "true")
    return fields
