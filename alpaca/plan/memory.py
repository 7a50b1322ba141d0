"""Peak memory of a rank during a step, computed from what the trainer keeps.

The peak is the largest of four moments: the loss (all activations and one chunk of logits), the
start of the backward pass (the loss's gradients, the root gathered again), the backward pass of the
last layer, which runs first (all activations, one layer's gradients being reduced), and the end of
the backward pass (the embedding's gradients). With an adapter only its weights have masters,
gradients and moments; the frozen ones are held as they are computed with. All sizes are bytes; c is
the size of a number in the compute type: 2 in bf16, 4 in fp32.
"""

from dataclasses import dataclass, fields

from alpaca.plan import adapters
from alpaca.plan.adapters import Adapter, Weights
from alpaca.plan.shapes import Shape
from alpaca.plan.workload import LargestPack
from alpaca.recipe.rules import ADAMW_BYTES, GRADIENT_BYTES, LOSS_CHUNK, MASTER_BYTES

LOGIT = 6  # bytes of a logit in the loss: fp32, and a copy in bf16 where that is the compute type
LOGIT_FP32 = 4
# CUDA's context, its libraries' workspaces and NCCL's buffers; drivers differ by some 100 MB.
CUDA_RUNTIME = 1_200_000_000
# A rank without CUDA: Python, torch, transformers, the tokenizer, code (0.43 GB measured, idle).
CPU_RUNTIME = 450_000_000
# torch.compile and its imports, which torchao's 8-bit step uses too (0.16 GB measured).
COMPILER = 160_000_000
# peft and what it imports (0.06 GB measured).
ADAPTERS = 60_000_000
# The caching allocator holds more than is in use: blocks are rounded up, and freed blocks of the
# wrong size stay cached. The allowance is a tenth of what is allocated and freed within a step.
ALLOCATOR = 0.1
# glibc cannot use a freed block of torch's again for one of the same size (`alpaca/heap.py`): it
# keeps 40 to 60% of what is allocated and freed within a step (measured, bench/LOG.md).
HEAP = 0.5
# tcmalloc uses them again. It divides a freed chunk of logits, its largest block, for smaller ones,
# so the next chunk needs new memory (measured, bench/LOG.md).
TCMALLOC = 0.1
# Where CPU ranks share parameters, gloo copies what it gathers and reduces, and the gradients'
# shards are allocated between such copies. The heap then keeps about 0.7 of the shards' size more;
# tcmalloc does so only once there are gradients. Measured with two ranks in fp32 and bf16
# (bench/LOG.md).
GLOO = 0.7


@dataclass(frozen=True)
class Setting:
    """What a rank's memory depends on, besides the model and the packs.

    shards: ranks that share each parameter; compute: c; optimizer: bytes per parameter; regather:
    weights are gathered again for the backward pass, not kept from the forward pass; once: whole
    gradients are added up on each rank and reduced with a step's last pack; chunk: targets whose
    logits exist at once; logit: bytes of each of these logits; adapter: what is trained in place of
    all weights; tcmalloc: a CPU's heap is tcmalloc.
    """

    shards: int
    compute: int
    optimizer: float = ADAMW_BYTES
    checkpointing: bool = False
    offload: bool = False
    regather: bool = True
    once: bool = False
    cuda: bool = True
    chunk: int = LOSS_CHUNK
    logit: int = LOGIT
    adapter: Adapter | None = None
    tcmalloc: bool = False

    def weights(self, shape: Shape) -> Weights:
        """What is trained and what is frozen."""
        return adapters.weights(shape, self.adapter, self.compute)

    @property
    def gathers_frozen(self) -> bool:
        """Whether frozen weights are gathered layer by layer: not where each rank holds all."""
        return self.shards > 1 or self.offload


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one rank; `moment` is one of the four that `peak` compares."""

    moment: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    communication: int
    allocator: int
    runtime: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "moment")


def state_bytes(parameters: int, optimizer: float = ADAMW_BYTES) -> int:
    """Master weights, gradients and optimizer state of a whole model.

    With AdamW, 16 bytes per parameter: 112 GB for seven billion (stanford_alpaca, README,
    "Fine-tuning": 7 x 4 x 4 GB).
    """
    return round(parameters * (MASTER_BYTES + GRADIENT_BYTES + optimizer))


def peak(shape: Shape, load: LargestPack, setting: Setting, runtime: int = CUDA_RUNTIME) -> Memory:
    """Peak memory of one rank in any step but the first: the largest of the four moments."""
    weights = setting.weights(shape)
    elsewhere = setting.offload and setting.cuda
    own = 0 if elsewhere else -(-weights.trained // setting.shards)
    frozen = 0 if elsewhere else -(-weights.frozen // setting.shards)
    gradients = GRADIENT_BYTES * own
    # Gradients of the step's earlier packs: already reduced, or whole and still to be reduced.
    earlier = (GRADIENT_BYTES * weights.trained if setting.once else gradients) * load.repeated
    moments = {
        "loss": (earlier, *_loss(shape, load, setting)),
        "backward start": (earlier, *_backward_start(shape, load, setting)),
        "layer": (earlier, *_layer(shape, load, setting)),
        "root": (max(earlier, gradients), *_root(shape, setting)),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, activations, logits, communication = moments[moment]
    passing = activations + logits + communication
    if setting.cuda:
        slack = ALLOCATOR * passing
    else:
        shards = gradients if setting.tcmalloc else GRADIENT_BYTES * own
        copied = GLOO * shards if setting.shards > 1 else 0.0
        kept = TCMALLOC if setting.tcmalloc else HEAP
        slack = kept * (passing + gradients) + logits * setting.tcmalloc + copied
    return Memory(
        moment=moment,
        weights=MASTER_BYTES * own + frozen,
        gradients=gradients,
        optimizer=round(setting.optimizer * own),
        activations=activations,
        logits=logits,
        communication=communication,
        allocator=round(slack),
        runtime=runtime,
    )


def _loss(shape: Shape, load: LargestPack, setting: Setting) -> tuple[int, int, int]:
    """The loss: all activations, one chunk of logits, and the output matrix's gradient if trained.

    Of a frozen model, only here the hidden states and those at targets are still there.
    """
    kept = activations(shape, load, setting)
    if setting.adapter is not None:
        kept += setting.compute * (load.tokens + load.targets) * shape.width
    chunk = setting.logit * shape.vocabulary * min(setting.chunk, load.targets)
    return kept, chunk, gathered(shape, setting) + _head(shape, setting)


def _backward_start(shape: Shape, load: LargestPack, setting: Setting) -> tuple[int, int, int]:
    """The start of the backward pass: the output matrix's gradient is scaled into a second one.

    The root is gathered again, and for a moment it exists twice, flat and split into parameters.
    So does a layer.
    """
    weights = setting.weights(shape)
    root = setting.compute * weights.root + weights.frozen_root
    flat = root if setting.shards > 1 else 0
    head = 2 * _head(shape, setting)
    return activations(shape, load, setting), 0, gathered(shape, setting) + flat + head


def _layer(shape: Shape, load: LargestPack, setting: Setting) -> tuple[int, int, int]:
    """The last layer's backward pass: the other layers' activations are still needed."""
    kept = activations(shape, load, setting)
    if setting.checkpointing:
        kept += saved_by_layer(shape, load, setting)
    kept += 2 * setting.compute * load.tokens * shape.intermediate  # gradients inside the MLP
    if setting.adapter is not None:
        kept += adapters.temporary(shape, setting.adapter, setting.compute)
    reducing = (setting.compute + GRADIENT_BYTES) * setting.weights(shape).layer
    return kept, 0, gathered(shape, setting) + reducing + _head(shape, setting)


def _root(shape: Shape, setting: Setting) -> tuple[int, int, int]:
    """The end of the backward pass: gradients of embedding and output matrix are reduced."""
    root = setting.weights(shape).root
    gradients = (setting.compute + GRADIENT_BYTES) * root
    return 0, 0, setting.compute * root + gradients


def _head(shape: Shape, setting: Setting) -> int:
    """The output matrix's gradient, in the compute type; none where it is frozen."""
    return 0 if setting.adapter is not None else setting.compute * shape.table_parameters


def gathered(shape: Shape, setting: Setting) -> int:
    """Whole weights in the compute type: the root's, and two layers', or all of them.

    FSDP2 gathers a layer while the one before it computes (torch, `fully_shard`: prefetching);
    with `reshard_after_forward=False` every layer stays gathered until its backward pass. Frozen
    weights are gathered as they are held.
    """
    layers = 2 if setting.regather else shape.layers
    weights = setting.weights(shape)
    whole = setting.compute * (weights.root + layers * weights.layer)
    if setting.gathers_frozen:
        whole += weights.frozen_root + layers * weights.frozen_layer
    return whole


def activations(shape: Shape, load: LargestPack, setting: Setting) -> int:
    """What the forward pass of a pack keeps for the backward pass, without the logits.

    With checkpointing, only each layer's input is kept, and one layer at a time is recomputed
    (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
    """
    hidden = setting.compute * load.tokens * shape.width
    last = normed(shape, load.tokens, setting) + setting.compute * load.targets * shape.width
    if setting.adapter is None:
        last += setting.compute * load.targets * shape.width  # the hidden states at targets
    if setting.checkpointing:
        return shape.layers * hidden + last
    return shape.layers * saved_by_layer(shape, load, setting) + last


def saved_by_layer(shape: Shape, load: LargestPack, setting: Setting) -> int:
    """What autograd saves for one LLaMA layer, tensor by tensor as in transformers' code.

    Follows the counting of Korthikanti et al., "Reducing Activation Recomputation in Large
    Transformer Models", 2022, section 4.1, for this layer: two RMSNorms, attention by a fused
    kernel (inputs, output, one log-sum-exp a head), and a gated MLP (gate, its SiLU, up, product).
    A frozen linear layer does not save its input; the adapter beside it does, except in a gated MLP
    (`training/lowrank.py`).
    """
    c, tokens = setting.compute, load.tokens
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    trained = setting.adapter is None
    fused = setting.cuda and c == 2  # the kernel does not support fp32
    attended = load.keys if setting.cuda else tokens  # a CPU keeps those of the pack, once
    attention = c * (2 * tokens * queries + 2 * attended * keys) + 4 * shape.heads * tokens
    if setting.cuda and not fused:
        # One call per segment: outputs are saved before and after they are joined, keys and values
        # before and after the shared prefix is prepended.
        attention += c * (tokens * queries * trained + 2 * tokens * keys)
    adapter = setting.adapter
    of_mlp = 4 if adapter is None else 2 if adapter.computes_gated(shape) else 3
    mlp = of_mlp * c * tokens * shape.intermediate
    if shape.qk_norm:  # each head's queries and keys are normed as a layer's input is
        attention += (4 + 2 * c * trained) * tokens * (queries + keys)
    whole = 2 * normed(shape, tokens, setting) + attention + mlp
    if adapter is not None:
        one = fused or not setting.cuda
        whole += adapters.saved(shape, adapter, tokens, c, cuda=setting.cuda, whole=one)
    return whole


def normed(shape: Shape, tokens: int, setting: Setting) -> int:
    """What one RMSNorm saves: its input in fp32, the normed input, and its output (c each).

    A frozen one saves only its input.
    """
    own = 4 if setting.adapter is not None else 4 + 2 * setting.compute
    return own * tokens * shape.width + 4 * tokens
