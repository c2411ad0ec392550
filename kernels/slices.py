"""A setup for logits of a part of the classes, of which other ranks have the rest (see `xent_ext.parallel`)."""

from .setup import NO_GRADIENT, NO_RESULTS, Setup


class SliceSetup(Setup):
    """The passes over a slice of the classes: rows are split, and their other parts are on other ranks.

    `summarise` comes before the summaries of all ranks are gathered, the others after it.
    """

    def summarise(self, tensors, packed):
        """Write the summary of each row to `packed`, (fields, rows)."""
        with self.on_gpu():
            given, saved = self.given(tensors), self.new(*self.summary_shape)
            self.launches.walk(given, NO_RESULTS, NO_GRADIENT, saved)
            self.launches.collect(given, saved, packed)

    def forward(self, tensors, expected, gathered):
        """`Setup.forward`, with the summaries of all ranks, (ranks, fields, rows).

        The loss is that of each row for "none", else None: the row losses are among what is kept.
        """
        with self.on_gpu():
            given, results = self.given(tensors), self.new_results()
            normalizer = self.normalizer(tensors, given)
            memory = slope = None
            gradient, ends = NO_GRADIENT, self.launches.ends
            if self.makes_gradient and expected is not None:
                memory = self.new_gradient(tensors, given)
                slope = self.new_slope() if self.wanted.slope else None
                if self.classes:
                    gradient = self.view(memory), slope, (expected, None, None, None), normalizer, expected, None
                    ends = self.launches.ends_with_gradient
            ends(given, results, gradient, gathered)
            loss = results[0] if self.per_row else None
            stats = self.statistics(tensors[1], *results[2:]) if self.problem.stats else ()
            return loss, stats, (memory, slope, results[1], normalizer, gathered)

    def backward(self, tensors, kept, upstream, expected):
        if self.classes:
            return super().backward(tensors, kept, upstream, expected)
        slope = self.new_slope() if self.wanted.slope else None
        return self.new_gradient(tensors, self.given(tensors)), slope, None
