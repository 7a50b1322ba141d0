"""How much memory a rank needs at the worst moment of a step, from what the trainer keeps.

Four moments compete: the loss (all activations and one chunk of logits), the turn to the backward
pass (the loss's gradients, the root gathered again), the first layer's backward pass (all
activations, one layer's gradients on their way), and its end (the embedding's gradients). Every
number is bytes; c stands for the bytes of a number in the compute type, 2 in bf16, 4 in fp32.
"""

from dataclasses import dataclass, fields

from alpaca.plan.shapes import Shape
from alpaca.plan.workload import LargestPack
from alpaca.recipe.rules import ADAMW_BYTES, GRADIENT_BYTES, LOSS_CHUNK, MASTER_BYTES

LOGIT = 6  # bytes of a logit in the loss: fp32, and a copy in bf16 where that is the compute type
# CUDA's context, its libraries' workspaces and NCCL's buffers; drivers differ by some 100 MB.
CUDA_RUNTIME = 1_200_000_000
# A rank without CUDA: Python, torch, transformers, the tokenizer, code (0.43 GB measured, idle).
CPU_RUNTIME = 450_000_000
# torch.compile with what it imports, through which torchao's 8-bit step goes (0.16 GB measured).
COMPILER = 160_000_000
# The caching allocator holds more than is in use: blocks are rounded up, and freed ones of the
# wrong size wait. A tenth of what comes and goes within a step is the allowance for that.
ALLOCATOR = 0.1
# glibc keeps freed blocks of some MB, as activations are, in its heap, where others lie between
# them. Measured (bench/LOG.md): 40 to 60% of what comes and goes; with MALLOC_MMAP_THRESHOLD_ set,
# so that each block goes back at once, nothing, for a fifth more CPU time.
HEAP = 0.5
# Where a CPU's ranks share parameters, gloo copies what it gathers and reduces, and the shards of
# the gradients come to lie between such copies: the heap keeps about their own size again.
# Measured with two ranks in fp32 and bf16 (bench/LOG.md).
GLOO = 1.0


@dataclass(frozen=True)
class Setting:
    """What, beside the model and the packs, decides how much a rank needs.

    shards: ranks that share each parameter; compute: c; optimizer: bytes a parameter; regather:
    weights are gathered again for the backward pass, not kept from the forward pass; once: whole
    gradients are added up on each rank and reduced with a step's last pack; chunk: targets that
    meet the vocabulary at once, each logit of which takes `logit` bytes.
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


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the worst moment: the loss, the turn, a layer, or the root."""

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
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "moment")


def state_bytes(parameters: int, optimizer: float = ADAMW_BYTES) -> int:
    """Master weights, gradients and optimizer state of a whole model.

    With AdamW 16 bytes a parameter: 112 GB for seven billion (stanford_alpaca, README,
    "Fine-tuning": 7 x 4 x 4 GB).
    """
    return round(parameters * (MASTER_BYTES + GRADIENT_BYTES + optimizer))


def peak(shape: Shape, load: LargestPack, setting: Setting, runtime: int = CUDA_RUNTIME) -> Memory:
    """What one rank holds at the worst moment of any step but the first."""
    own = 0 if setting.offload and setting.cuda else -(-shape.parameters // setting.shards)
    gradients = GRADIENT_BYTES * own
    # What earlier packs of the step left: their reduced gradients, or whole ones to be reduced.
    earlier = (GRADIENT_BYTES * shape.parameters if setting.once else gradients) * load.repeated
    moments = {
        "loss": (earlier, *_loss(shape, load, setting)),
        "turn": (earlier, *_turn(shape, load, setting)),
        "layer": (earlier, *_layer(shape, load, setting)),
        "root": (max(earlier, gradients), *_root(shape, setting)),
    }
    moment = max(moments, key=lambda name: sum(moments[name]))
    gradients, activations, logits, communication = moments[moment]
    passing = activations + logits + communication
    if setting.cuda:
        slack = ALLOCATOR * passing
    else:
        copied = GLOO * GRADIENT_BYTES * own if setting.shards > 1 else 0.0
        slack = HEAP * (passing + gradients) + copied
    return Memory(
        moment=moment,
        weights=MASTER_BYTES * own,
        gradients=gradients,
        optimizer=round(setting.optimizer * own),
        activations=activations,
        logits=logits,
        communication=communication,
        allocator=round(slack),
        runtime=runtime,
    )


def _loss(shape: Shape, load: LargestPack, setting: Setting) -> tuple[int, int, int]:
    """All activations are alive, the output matrix's gradient, and one chunk of logits."""
    kept = activations(shape, load, setting)
    chunk = setting.logit * shape.vocabulary * min(setting.chunk, load.targets)
    head = setting.compute * shape.table_parameters
    return kept, chunk, gathered(shape, setting) + head


def _turn(shape: Shape, load: LargestPack, setting: Setting) -> tuple[int, int, int]:
    """The backward pass begins: the output matrix's gradient is scaled into a second one.

    The root is gathered again, and lies there flat and laid out for a moment; a layer does so too.
    """
    flat = setting.compute * shape.root_parameters if setting.shards > 1 else 0
    head = 2 * setting.compute * shape.table_parameters
    return activations(shape, load, setting), 0, gathered(shape, setting) + flat + head


def _layer(shape: Shape, load: LargestPack, setting: Setting) -> tuple[int, int, int]:
    """The last layer's backward pass: the others' activations still wait for theirs."""
    kept = activations(shape, load, setting)
    if setting.checkpointing:
        kept += saved_by_layer(shape, load, setting)
    passing = 2 * setting.compute * load.tokens * shape.intermediate  # gradients inside the MLP
    reducing = (setting.compute + GRADIENT_BYTES) * shape.layer_parameters
    head = setting.compute * shape.table_parameters
    return kept + passing, 0, gathered(shape, setting) + reducing + head


def _root(shape: Shape, setting: Setting) -> tuple[int, int, int]:
    """The end of the backward pass: gradients of embedding and output matrix are reduced."""
    gradients = (setting.compute + GRADIENT_BYTES) * shape.root_parameters
    return 0, 0, setting.compute * shape.root_parameters + gradients


def gathered(shape: Shape, setting: Setting) -> int:
    """Whole weights in the compute type: the root's, and two layers', or all of them.

    FSDP2 gathers a layer while the one before it computes (torch, `fully_shard`: prefetching);
    with `reshard_after_forward=False` every layer stays gathered until its backward pass.
    """
    layers = 2 if setting.regather else shape.layers
    return setting.compute * (shape.root_parameters + layers * shape.layer_parameters)


def activations(shape: Shape, load: LargestPack, setting: Setting) -> int:
    """What the forward pass of a pack leaves for the backward pass, without the logits.

    With checkpointing only each layer's input is kept, and one layer at a time is computed again
    (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
    """
    hidden = setting.compute * load.tokens * shape.width
    last = normed(shape, load.tokens, setting.compute) + 2 * setting.compute * (
        load.targets * shape.width
    )
    if setting.checkpointing:
        return shape.layers * hidden + last
    return shape.layers * saved_by_layer(shape, load, setting) + last


def saved_by_layer(shape: Shape, load: LargestPack, setting: Setting) -> int:
    """What autograd saves of one LLaMA layer, tensor by tensor of transformers' code.

    Follows the counting of Korthikanti et al., "Reducing Activation Recomputation in Large
    Transformer Models", 2022, section 4.1, for this layer: two RMSNorms, attention by a fused
    kernel (inputs, output, one log-sum-exp a head), and a gated MLP (gate, its SiLU, up, product).
    """
    c, tokens = setting.compute, load.tokens
    queries, keys = shape.heads * shape.head, shape.kv_heads * shape.head
    attention = c * (2 * tokens * queries + 2 * load.keys * keys) + 4 * shape.heads * tokens
    if not setting.cuda or c == 4:  # the fused kernel knows no fp32
        # A call a segment: outputs are saved before and after they are joined, keys and values
        # before and after the shared prefix is put before them.
        attention += c * (tokens * queries + 2 * tokens * keys)
    mlp = 4 * c * tokens * shape.intermediate
    if shape.qk_norm:  # each head's queries and keys are normed as a whole layer's input is
        attention += (4 + 2 * c) * tokens * (queries + keys)
    return 2 * normed(shape, tokens, c) + attention + mlp


def normed(shape: Shape, tokens: int, compute: int) -> int:
    """What one RMSNorm saves: its input in fp32, the normed input, and its output (c each)."""
    return (4 + 2 * compute) * tokens * shape.width + 4 * tokens
