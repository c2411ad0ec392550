"""Which gradients are made ahead: only few at a time on a device, so that many losses hold no more than PyTorch's hold.

A loss whose gradient is made ahead holds two copies of the logits until its backward, the logits and the gradient,
where PyTorch's own needs one, its log-softmax. PyTorch's has two more at its peak, in backward: n + 2 copies for n
losses of one graph. So two losses may have both gradients made ahead, but of more only one: the others leave theirs to
backward, which reads the logits once more, and there a gradient is made beside those that wait.

How many there will be is not known beforehand. Two are made ahead at first; a third loss lets go of one of them, and in
the next step but one is made. A step is what happens from one time that none waits to the next.
"""

import functools
import weakref

MOST_AHEAD = 2
LARGE = 1 << 20  # bytes of logits; many smaller ones do not fill a device, and it takes time to count them
# After so many losses those that wait do not count: someone keeps them, for the record it may be, and will not call
# backward. No graph of one step is thought to have as many losses.
PATIENCE = 64


class Ahead:
    """The gradients on a device that were made ahead and wait for their backward.

    `beside` of them may wait where others are made in backward.
    """

    def __init__(self, beside):
        self.beside = beside
        self.waiting = {}  # weak references, by the gradient's id
        self.most = MOST_AHEAD
        self.losses = 0  # of this step

    def has_room(self):
        """Whether one more may be made."""
        if len(self.waiting) >= self.most:
            for key, gradient in list(self.waiting.items()):
                if gradient() is None:  # its graph is gone
                    self.waiting.pop(key, None)
        return len(self.waiting) < self.most

    def note(self, gradient):
        """Note the gradient that a loss made, or None if it left it to backward."""
        if gradient is None:
            self.left()
        else:
            self.made(gradient)

    def made(self, gradient):
        if not self.waiting:  # a new step
            self.most, self.losses = self.beside if self.losses > MOST_AHEAD else MOST_AHEAD, 0
        self.losses += 1
        self.waiting[id(gradient)] = weakref.ref(gradient)

    def left(self):
        self.most = self.beside
        self.losses += 1
        if self.losses > PATIENCE:
            self.waiting.clear()
        for key in list(self.waiting)[: -self.beside]:
            self.let_go(key)

    def let_go(self, key):
        """Free a gradient's memory: its backward makes it anew."""
        gradient = self.waiting.pop(key, lambda: None)()
        if gradient is not None:
            gradient.data = gradient.new_empty(0)

    def took(self, gradient):
        """Whether backward may have it, which was not let go; it waits no longer."""
        return self.waiting.pop(id(gradient), None) is not None


@functools.cache
def on_device(device, beside):
    return Ahead(beside)


def ahead_on(tensor, beside=1):
    """The gradients on its device, or None for a tensor too small to matter."""
    return on_device(tensor.device, beside) if tensor.numel() * tensor.element_size() >= LARGE else None
