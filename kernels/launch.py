"""A kernel with its grid and numbers, to be launched again and again."""

import functools
import typing

import triton

# Products and sums in one instruction, whatever Triton does by default.
FUSED = {"enable_fp_fusion": True}


class Launch:
    """A kernel, how many programs it has, its last arguments, which are numbers, and Triton's options.

    Each time that Triton launches a kernel it finds the compiled code anew, by the types and the divisibility of all
    arguments, which takes longer than many a kernel. Here the code that was compiled for an NVIDIA GPU is kept: a
    launch always has the same of its tensors, of the same dtypes, and alike aligned where it matters. (For an AMD GPU
    the sizes of storages matter, too; and the interpreter compiles nothing.)
    """

    def __init__(self, kernel, programs, *numbers, **options):
        self.kernel, self.programs = kernel, programs
        self.numbers, self.options = numbers, options | FUSED
        self.run = self.driver = None

    def __call__(self, *tensors):
        """Launch it with the kernel's first arguments, whose tuples need no names: to make these takes longer."""
        if self.run is None:
            tensors = named(self.kernel.fn.__annotations__, self.kernel.arg_names, tensors)
            self.keep(self.kernel[self.programs, 1, 1](*tensors, *self.numbers, **self.options))
        else:
            stream = self.driver.get_current_stream(self.driver.get_current_device())
            self.run(stream, *self.code, *tensors, *self.numbers)

    def keep(self, code):
        """Launch this code from now on, as `torch.compile` launches its own; without Triton's hooks for launches."""
        if is_reusable(code):
            self.driver, self.code = (
                triton.runtime.driver.active,
                (code.function, code.packed_metadata, None, None, None),
            )
            self.run = functools.partial(code.run, self.programs, 1, 1)  # last, as other threads look at it


def named(annotations, names, values):
    """Values with the tuples among them, and in these, as the named tuples that they are annotated to be."""
    return [
        as_annotated(annotations[name], value) if type(value) is tuple else value
        for name, value in zip(names, values, strict=False)
    ]


def as_annotated(annotation, values):
    kind, *_ = [each for each in (annotation, *typing.get_args(annotation)) if hasattr(each, "_fields")]
    return kind(*named(kind.__annotations__, kind._fields, values))


def is_reusable(code):
    """Whether a launch gave code for an NVIDIA GPU."""
    return isinstance(code, triton.compiler.CompiledKernel) and code.metadata.target.backend == "cuda"
