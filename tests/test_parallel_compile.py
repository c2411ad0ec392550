"""Classes in slices in compiled graphs: one collective in forward, which the compiler sees, and none in backward."""

import dataclasses
import itertools

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from test_compile import all_reductions, both_targets, compiled, needs_compiler, nothing_compiled, opcheck_operators  # noqa: F401
from test_compiled_autograd import gradients_of_compiled_autograd, total
from test_options import DIFFERENTIABLE, call, outcome
from test_parallel import SIZES, sliced, start
from test_parallel import pytestmark as needs_gloo
from test_slices import small_gpu  # noqa: F401
from torch._dynamo.backends.common import aot_autograd

import xent_ext
from xent_ext import backends, dispatch, ops
from xent_ext.call import Arguments, Options, prepare

pytestmark = [
    needs_gloo,
    pytest.mark.skipif(not backends.RECENT, reason="this PyTorch's compiler can't trace the package"),
]
GATHER = ["_c10d_functional.all_gather_into_tensor.default", "_c10d_functional.wait_tensor.default"]
FORWARD = ["xent_ext.summary.default", *GATHER, "xent_ext.forward.default"]
BACKWARD = ["xent_ext.backward.default"]
EVERYTHING = {
    "logit_scale": "logit_scale", "softcap": 2.0, "z_loss": 0.3, "label_smoothing": 0.1,
    "sample_weight": "sample_weight", "return_stats": True,
}  # fmt: skip
CASES = {
    "everything": (EVERYTHING, ("loss", *DIFFERENTIABLE)),
    "none": ({"reduction": "none", "sample_weight": "sample_weight", "return_stats": ("correct",)}, ("loss",)),
    "probabilities": ({"probabilities": True, "return_stats": True}, ("loss",)),
}
ROWS = (7, 9, 12)
# In graphs on a CPU nothing but ranks has operators; `start` tells its processes otherwise.
IS_SMALL = dispatch.is_small


def here(rank, shape, **options):
    """A rank's arguments of a call."""
    sizes = SIZES[dist.get_world_size()]
    first = sum(sizes[:rank])
    args = sliced(call(shape, **options), first, sizes[rank])
    return args | {"process_group": dist.group.WORLD, "class_start": first, "num_classes": sum(sizes)}


def recorder(graphs):
    """A backend that adds the operators of this package, and the collectives, of each of its graphs to a list."""

    def note(graph, _):
        names = [str(node.target) for node in graph.graph.nodes]
        graphs.append([name for name in names if name.startswith(("xent_ext.", "_c10d_functional."))])
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)


# --- In each process


def graphs(rank):
    """For each case what a compiled and an eager call find of several batches, and the operators of all graphs."""
    found = {}
    for name, (options, upstreams) in CASES.items():
        torch._dynamo.reset()
        operators = []
        function = torch.compile(xent_ext.cross_entropy, fullgraph=True, backend=recorder(operators))
        batches = [here(rank, (rows, 23), **options) for rows in ROWS]
        results = [[outcome(each, args, upstreams) for each in (function, xent_ext.cross_entropy)] for args in batches]
        found[name] = results, operators
    return found


def inductor(rank):
    """A module of equal slices and a subgroup, padded, by Inductor."""
    group = dist.new_group(range(dist.get_world_size()))
    criterion = xent_ext.CrossEntropyLoss(
        process_group=group, num_classes=21, return_stats=("lse", "correct"), label_smoothing=0.1
    )
    args = sliced(call((6, 22)), 11 * rank, 11)
    args = {"input": args["input"], "target": args["target"] % 21}
    return [
        outcome(function, args)
        for function in (torch.compile(criterion, fullgraph=True, backend="inductor"), criterion)
    ]


def distributed_tensors(rank):
    """`DTensor` logits whose classes are sharded."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    operators = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    input, target, weight = call((6, 23)).values()
    leaf = distribute_tensor(input.detach(), mesh, [Shard(1)]).requires_grad_()
    function = torch.compile(xent_ext.cross_entropy, fullgraph=True, backend=recorder(operators))
    found = []
    for cross_entropy in (function, xent_ext.cross_entropy):
        loss = cross_entropy(leaf, target, weight)
        (gradient,) = torch.autograd.grad(loss, leaf)
        found.append((loss.to_local(), gradient.to_local()))
    return found, operators


def layer(rank):
    """The last linear layer, whose operator makes its collectives itself."""
    sizes = SIZES[dist.get_world_size()]
    first = sum(sizes[:rank])
    here, linear_weight, target = slice(first, first + sizes[rank]), torch.randn(23, 4), torch.rand(10, 23)
    args = {
        "input": torch.randn(10, 4, requires_grad=True),
        "linear_weight": linear_weight[here].clone().requires_grad_(),
        "target": target[:, here], "reduction": "none", "chunk_rows": 4, "return_stats": ("correct",),
        "process_group": dist.group.WORLD, "class_start": first, "num_classes": sum(sizes),
    }  # fmt: skip
    function = torch.compile(xent_ext.linear_cross_entropy, fullgraph=True, backend="inductor")
    return [outcome(each, args, ("loss",)) for each in (function, xent_ext.linear_cross_entropy)]


def backward_of_eager(rank):
    """Gradients by compiled autograd and by autograd of an eager call, and the operators of the first's graph."""
    operators = []
    args = here(rank, (7, 23), **EVERYTHING)
    leaves = [value for value in args.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    eager = torch.autograd.grad(total(args), leaves)
    ours = gradients_of_compiled_autograd(total(args), args, recorder(operators))
    return list(ours.values()), list(eager), operators


def disagreement(rank):
    """What is raised where the ranks have other targets, if ranks are to be checked; and that all is well after it."""
    backends.CHECK = True
    args = here(rank, (7, 23))
    args["target"] = (args["target"] + rank).clamp(0, 22)
    function = torch.compile(xent_ext.cross_entropy, fullgraph=True, backend="eager")
    try:
        function(**args)
    except RuntimeError as error:
        args["target"].fill_(3)
        return str(error), function(**args).detach()
    finally:
        backends.CHECK = False
    return "nothing", None


def work(rank):
    dispatch.is_small, found = IS_SMALL, {}
    for function in (graphs, inductor, distributed_tensors, layer, backward_of_eager, disagreement):
        torch._dynamo.reset()
        torch.manual_seed(0)
        found[function.__name__] = function(rank)
    return found


# --- Tests


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process found."""
    return start(work, 2, tmp_path_factory.mktemp("processes") / "compiled")


@pytest.mark.parametrize("name", CASES)
def test_the_results_are_those_of_eager_calls(ranks, name):
    """And equal on all ranks to the bit, but for gradients."""
    batches = [of_rank["graphs"][name][0] for of_rank in ranks]
    for ours, eager in itertools.chain(*batches):
        torch.testing.assert_close(ours, eager)
    for (one, _), (other, _) in zip(*batches, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one if not key.startswith("d "))


@pytest.mark.parametrize("name", CASES)
def test_one_collective_and_one_graph_for_all_batch_sizes(ranks, name):
    """The first batch gives a graph for its size, the second one for every size: each as forward and backward."""
    for of_rank in ranks:
        assert of_rank["graphs"][name][1] == 2 * [FORWARD, BACKWARD]


@needs_compiler
def test_inductor(ranks):
    for ours, eager in (of_rank["inductor"] for of_rank in ranks):
        torch.testing.assert_close(ours, eager)


def test_the_linear_layer(ranks):
    for ours, eager in (of_rank["layer"] for of_rank in ranks):
        torch.testing.assert_close(ours, eager)


def test_distributed_tensors(ranks):
    for (ours, eager), operators in (of_rank["distributed_tensors"] for of_rank in ranks):
        torch.testing.assert_close(ours, eager)
        assert operators == [FORWARD, BACKWARD]


def test_compiled_autograd_gathers_nothing(ranks):
    for ours, eager, operators in (of_rank["backward_of_eager"] for of_rank in ranks):
        torch.testing.assert_close(ours, eager)
        assert operators == [BACKWARD]


def test_ranks_that_disagree(ranks):
    for message, loss in (of_rank["disagreement"] for of_rank in ranks):
        assert message.startswith("target must be the same on all ranks")
        assert loss.isfinite()


# --- The operators, for ranks in this process


def ranks_of(args, sizes=(10, 13)):
    """Problem and tensors of each rank, with the summaries of all."""
    fields = {name: args.pop(name) for name in ("input", "target", "weight")}
    arguments = Arguments(**fields, reduction=args.pop("reduction"), label_smoothing=args.pop("label_smoothing", 0.0))
    problem, whole = prepare(arguments, Options(**args))
    ranks = []
    for rank, (first, size) in enumerate(zip(itertools.accumulate((0, *sizes)), sizes, strict=False)):
        place = {"num_classes": sum(sizes), "class_start": first, "ranks": len(sizes), "rank": rank}
        tensors = whole._replace(**{name: sliced(fields, first, size)[name] for name in fields})
        ranks.append((dataclasses.replace(problem, group="of this process", **place), tensors))
    with torch.no_grad():
        gathered = torch.stack([torch.ops.xent_ext.summary(*ops.arguments(*rank)) for rank in ranks])
    return [(problem, tensors._replace(gathered=gathered)) for problem, tensors in ranks]


def opcheck_of_rank(problem, tensors, **which):
    opcheck_operators(problem, tensors, **which)
    with torch.no_grad():
        given = ops.arguments(problem, tensors._replace(input=tensors.input.detach(), gathered=None))
        torch.library.opcheck(torch.ops.xent_ext.summary.default, given, **which)


@all_reductions
@both_targets
def test_opcheck(many_blocks, probabilities, reduction):
    _, rank = ranks_of(call((4, 23), probabilities=probabilities, reduction=reduction, **EVERYTHING))
    opcheck_of_rank(*rank)


@pytest.mark.usefixtures("small_gpu")
def test_opcheck_of_kernels():
    _, rank = ranks_of(call((2, 23), ignored=0.0, reduction="mean", return_stats=("correct",)))
    opcheck_of_rank(*rank, test_utils=("test_schema", "test_faketensor"))


def test_no_gradient_of_a_gradient(many_blocks):
    ((problem, tensors), _) = ranks_of(call((4, 23), reduction="sum"))
    loss, _ = torch.ops.xent_ext.forward(*ops.arguments(problem, tensors))
    with pytest.raises(NotImplementedError, match="classes of several ranks have no gradient for create_graph"):
        torch.autograd.grad(loss, tensors.input, create_graph=True)


# --- Padded classes on one device


@pytest.mark.parametrize("plain", [False, True], ids=["fused", "plain"])
def test_padded_classes(many_blocks, monkeypatch, plain):
    """By the operators, or by the plain formula, which Inductor compiles for a CPU."""
    if plain:
        monkeypatch.setattr(dispatch, "is_small", IS_SMALL)
    function, counter = compiled(xent_ext.cross_entropy, "aot_eager")
    for rows in ROWS:
        args = call((rows, 23), sample_weight="sample_weight", return_stats=True, num_classes=20)
        args["target"] = args["target"].clamp(max=19)
        torch.testing.assert_close(outcome(function, args), outcome(xent_ext.cross_entropy, args))
    assert counter.frame_count == 2
