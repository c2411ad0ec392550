"""Which gradients are made ahead: only few at a time on a device, so that many losses hold about what PyTorch's hold.

A loss whose gradient is made ahead holds two copies of the logits until its backward, the logits and the gradient,
where PyTorch's own needs one, its log-softmax. PyTorch's has two more at its peak, in backward: n + 2 copies for n
losses of one graph. With two gradients made ahead two losses peak there, too, and more of them at n + 3. While two
wait, further losses leave theirs to backward, which reads the logits once more.
"""

import functools
import weakref

MOST_AHEAD = 2
LARGE = 1 << 20  # bytes of logits; many smaller ones do not fill a device, and it takes time to count them
# So many losses in a row leave theirs to backward, then those that wait do not count: someone keeps two losses, for the
# record it may be, and will not call backward. No graph of one step is thought to have as many losses.
PATIENCE = 64


class Ahead:
    """The gradients on a device that were made ahead and wait for their backward."""

    def __init__(self):
        self.waiting = {}  # weak references, by the gradient's id
        self.refused = 0

    def has_room(self):
        """Whether one more may be made."""
        if len(self.waiting) < MOST_AHEAD:
            return True
        for key, gradient in list(self.waiting.items()):
            if gradient() is None:  # its graph is gone
                self.waiting.pop(key, None)
        self.refused += 1
        if self.refused > PATIENCE:
            self.waiting.clear()
        return len(self.waiting) < MOST_AHEAD

    def made(self, gradient):
        """Note one that was made."""
        self.refused = 0
        self.waiting[id(gradient)] = weakref.ref(gradient)

    def went_back(self, gradient):
        """Note that it waits no longer."""
        self.waiting.pop(id(gradient), None)


@functools.cache
def on_device(device):
    return Ahead()


def ahead_on(logits):
    """The gradients on their device, or None for logits too small to matter."""
    return on_device(logits.device) if logits.numel() * logits.element_size() >= LARGE else None
