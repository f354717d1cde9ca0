"""Contrastive losses: embeddings of positives become similar, others dissimilar.

Similarities and distances are exact to the arithmetic dtype on every backend. A row
with `mask` 0 is left out and may hold NaN. A zero vector has no direction: its cosine
with every vector is 0, without a gradient.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Integer, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.arrays import as_ids, as_labels, as_weights
from ava_jax.kernel.sharding import in_one_program
from ava_jax.ranges import check_range
from ava_jax.reduce import as_float, safe_divide, weighted_mean


def unit_vectors(
    x: Float[Array, "*N D"], *, min_norm: float = 1e-12
) -> Float[Array, "*N D"]:
    """Divides each vector by its norm, or by `min_norm` if that is larger."""
    norm = optax.safe_norm(x, 0.0, axis=-1, keepdims=True)
    clamped = jnp.maximum(norm, min_norm)
    return safe_divide(x, jnp.where(norm == 0, norm, clamped))


def _whole(x: Shaped[Array, "N *D"]) -> Shaped[Array, "N *D"]:
    """Gathers an explicitly sharded array, because every row is compared with all."""
    spec = jax.typeof(x).sharding.spec
    if all(axis is None for axis in spec):
        return x
    return jax.sharding.reshard(x, PartitionSpec(*(None for _ in spec)))


def _rows(
    embeddings: Float[Array, "N D"], mask: Shaped[Array, "N"] | None
) -> tuple[Float[Array, "N D"], Bool[Array, "N"]]:
    """Returns the embeddings with masked rows zeroed, and the unmasked rows."""
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be [N, D], got shape {embeddings.shape}")
    x, rows = as_float(_whole(embeddings)), embeddings.shape[0]
    if mask is None:
        return x, jnp.ones((rows,), bool)
    if mask.shape != (rows,):
        raise ValueError(f"mask must have shape ({rows},), got {mask.shape}")
    unmasked = _whole(as_weights("mask", mask)) != 0
    return jnp.where(unmasked[:, None], x, 0), unmasked


def _same_label(
    labels: Integer[Array, "N"], unmasked: Bool[Array, "N"]
) -> Bool[Array, "N N"]:
    if labels.shape != unmasked.shape:
        raise ValueError(
            f"labels must have one entry per row, {unmasked.shape}, got {labels.shape}"
        )
    labels = _whole(as_labels("labels", labels))
    return labels[:, None] == labels[None, :]


def _pairs_of(unmasked: Bool[Array, "*B N"]) -> Bool[Array, "*B N N"]:
    """Marks the ordered pairs of different unmasked rows."""
    different = ~jnp.eye(unmasked.shape[-1], dtype=bool)
    different = jnp.expand_dims(different, range(unmasked.ndim - 1))
    return unmasked[..., :, None] & unmasked[..., None, :] & different


def _valid_pairs(
    name: str, pairs: Integer[Array, "P 2"], unmasked: Bool[Array, "N"]
) -> Bool[Array, "P"]:
    """Marks the pairs of two different rows that exist and are unmasked."""
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{name} must be [P, 2] row numbers, got shape {pairs.shape}")
    inside = (pairs >= 0) & (pairs < unmasked.shape[0])
    valid = inside & unmasked[jnp.where(inside, pairs, 0)]
    return jnp.all(valid, axis=-1) & (pairs[:, 0] != pairs[:, 1])


def _check_exclusive(
    labels: Array | None, positive_pairs: Array | None, negative_pairs: Array | None
) -> None:
    paired = positive_pairs is not None or negative_pairs is not None
    if labels is not None and paired:
        raise ValueError(
            "got labels together with positive_pairs or negative_pairs; pass labels or "
            "pairs, not both"
        )


def _distances(x: Float[Array, "N D"]) -> Float[Array, "N N"]:
    """Computes Euclidean distances from differences, exact also for close rows."""
    return in_one_program(_distances_of_each, (), x)


def _distances_of_each(x: Float[Array, "N D"]) -> Float[Array, "N N"]:
    # A few rows at a time, recomputed in the backward pass: no [N, N, D] array.
    @jax.checkpoint
    def from_one(row: Float[Array, "D"]) -> Float[Array, "N"]:
        return optax.safe_norm(row[None] - x, 0.0, axis=-1)

    return jax.lax.map(from_one, x, batch_size=8)


def _named_distances(
    name: str,
    pairs: Integer[Array, "P 2"] | None,
    x: Float[Array, "N D"],
    unmasked: Bool[Array, "N"],
    normalize: bool,
) -> tuple[Float[Array, "P"], Bool[Array, "P"]]:
    """Computes the distance of each given pair, and marks the valid pairs."""
    if pairs is None:
        return jnp.zeros((0,), x.dtype), jnp.zeros((0,), bool)
    pairs = _whole(as_ids(pairs))
    valid = _valid_pairs(name, pairs, unmasked)
    # Rows are gathered first, so that a row in no pair may hold NaN.
    ends = x[jnp.where(valid[:, None], pairs, 0)]
    ends = jnp.where(valid[:, None, None], ends, 0)
    ends = unit_vectors(ends) if normalize else ends
    return optax.safe_norm(ends[:, 0] - ends[:, 1], 0.0, axis=-1), valid


@with_checked_arrays
def contrastive_margin_loss(
    embeddings: Float[Array, "N D"],
    *,
    labels: Integer[Array, "N"] | None = None,
    positive_pairs: Integer[Array, "P 2"] | None = None,
    negative_pairs: Integer[Array, "Q 2"] | None = None,
    margin: float | int = 0.5,
    normalize: bool = True,
    mask: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Computes the margin loss: positives pulled together, negatives pushed apart.

    `(mean d₊² + mean max(0, margin − d₋)²) / 2`, with `d` the Euclidean distance. The
    mean of no pairs is 0. A micro-batch has only its own pairs.

    Args:
      embeddings: `[N, D]`.
      labels: `[N]`; the pairs are all `i < j`, positive where the labels agree.
      positive_pairs: `[P, 2]` row numbers, instead of labels; a pair with a row outside
        `[0, N)`, with a masked row or with one row twice is left out, so −1 pads.
      negative_pairs: `[Q, 2]`, likewise.
      margin: the distance beyond which the loss of a negative pair is 0.
      normalize: whether to divide each embedding by its norm.
      mask: `[N]`, bool or numbers; a row with 0 is left out.

    Returns:
      A scalar.

    Raises:
      ValueError: neither labels nor pairs, or both, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
      >>> labels = jnp.array([0, 0, 1])
      >>> loss = losses.contrastive_margin_loss(x, labels=labels, margin=1.0)
      >>> round(float(loss), 4)
      1.0366

    References:
      Hadsell et al., Dimensionality Reduction by Learning an Invariant Mapping, 2006.
    """
    check_range("margin", margin, 0)
    if labels is None and positive_pairs is None and negative_pairs is None:
        raise ValueError(
            "contrastive_margin_loss needs labels, or positive_pairs and negative_pairs"
        )
    _check_exclusive(labels, positive_pairs, negative_pairs)
    x, unmasked = _rows(embeddings, mask)
    if labels is not None:
        same = _same_label(labels, unmasked)
        x = unit_vectors(x) if normalize else x
        together = apart = _distances(x)
        pairs = _pairs_of(unmasked)
        pulled, pushed = pairs & same, pairs & ~same
    else:
        together, pulled = _named_distances(
            "positive_pairs", positive_pairs, x, unmasked, normalize
        )
        apart, pushed = _named_distances(
            "negative_pairs", negative_pairs, x, unmasked, normalize
        )
    gap = jnp.maximum(margin - apart, 0)
    pull = weighted_mean(together**2, as_float(pulled))
    return (pull + weighted_mean(gap**2, as_float(pushed))) / 2


@with_checked_arrays
def contrastive_triplet_loss(
    embeddings: Float[Array, "N D"],
    *,
    labels: Integer[Array, "N"],
    margin: float | int = 0.5,
    normalize: bool = True,
    mask: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Computes the batch-hard triplet loss.

    `max(0, margin + max d₊ − min d₋)`, with `d` the Euclidean distance: an anchor's
    farthest positive should be closer than its nearest negative by a margin. The mean
    is over the anchors that have both, 0 if none has. A micro-batch has only its own
    rows.

    Args:
      embeddings: `[N, D]`.
      labels: `[N]`; rows of one label are positives of each other.
      margin: the difference of distances beyond which the loss is 0.
      normalize: whether to divide each embedding by its norm.
      mask: `[N]`, bool or numbers; a row with 0 is left out.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
      >>> loss = losses.contrastive_triplet_loss(x, labels=jnp.array([0, 0, 1]))
      >>> round(float(loss), 4)
      1.1508

    References:
      Hermans et al., In Defense of the Triplet Loss (batch hard), 2017.
    """
    check_range("margin", margin, 0)
    x, unmasked = _rows(embeddings, mask)
    same = _same_label(labels, unmasked)
    x = unit_vectors(x) if normalize else x
    distance, pairs = _distances(x), _pairs_of(unmasked)
    positive, negative = pairs & same, pairs & ~same
    farthest = jnp.max(distance, axis=-1, where=positive, initial=0)
    nearest = jnp.min(distance, axis=-1, where=negative, initial=jnp.inf)
    cost = jnp.maximum(margin + farthest - nearest, 0)
    anchors = jnp.any(positive, axis=-1) & jnp.any(negative, axis=-1)
    return weighted_mean(cost, as_float(anchors))


def _pair_matrix(
    name: str, pairs: Integer[Array, "P 2"], unmasked: Bool[Array, "N"]
) -> Bool[Array, "N N"]:
    """Marks the given pairs in both directions."""
    pairs, rows = _whole(as_ids(pairs)), unmasked.shape[0]
    ends = jnp.where(_valid_pairs(name, pairs, unmasked)[:, None], pairs, rows)
    marked = jnp.zeros((rows, rows), bool)
    marked = marked.at[ends[:, 0], ends[:, 1]].set(True, mode="drop")
    return marked | marked.T


def _halves(unmasked: Bool[Array, "N"]) -> Bool[Array, "N N"]:
    rows = unmasked.shape[0]
    if rows % 2:
        raise ValueError(
            "without labels or pairs, row i of the first half belongs to row i of the "
            f"second half, which needs an even number of rows, got {rows}; pass labels"
        )
    half = jnp.arange(rows, dtype=jnp.int32) % max(rows // 2, 1)
    return half[:, None] == half[None, :]


def _candidates(
    unmasked: Bool[Array, "N"],
    labels: Integer[Array, "N"] | None,
    positive_pairs: Integer[Array, "P 2"] | None,
    negative_pairs: Integer[Array, "Q 2"] | None,
) -> tuple[Bool[Array, "N N"], Bool[Array, "N N"]]:
    """Marks each anchor's positives, and all rows it is compared with."""
    _check_exclusive(labels, positive_pairs, negative_pairs)
    pairs = _pairs_of(unmasked)
    if labels is not None:
        return pairs & _same_label(labels, unmasked), pairs
    if positive_pairs is not None:
        positive = _pair_matrix("positive_pairs", positive_pairs, unmasked)
        if negative_pairs is None:
            return positive, pairs
        negative = _pair_matrix("negative_pairs", negative_pairs, unmasked)
        return positive, positive | negative
    if negative_pairs is not None:
        raise ValueError("negative_pairs needs positive_pairs to go with them")
    return pairs & _halves(unmasked), pairs


@with_checked_arrays
def contrastive_infonce_loss(
    embeddings: Float[Array, "N D"],
    *,
    labels: Integer[Array, "N"] | None = None,
    positive_pairs: Integer[Array, "P 2"] | None = None,
    negative_pairs: Integer[Array, "Q 2"] | None = None,
    temperature: Float[Array, ""] | float | int = 0.07,
    normalize: bool = True,
    mask: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Computes the InfoNCE loss: each row classifies its positives among all others.

    `−mean_{p ∈ P(i)} log( exp(s_ip / τ) / Σ_{a ≠ i} exp(s_ia / τ) )` per anchor `i`,
    with `s` the dot product; the mean is over the anchors that have a positive, 0 if
    none has. A row is never its own negative. A micro-batch has only its own negatives.

    Args:
      embeddings: `[N, D]`.
      labels: `[N]`; every other row of the anchor's label is a positive.
      positive_pairs: `[P, 2]` row numbers, instead of labels; each is used once and in
        both directions. A pair with a row outside `[0, N)`, with a masked row or with
        one row twice is left out, so −1 pads.
      negative_pairs: `[Q, 2]`, likewise; if given, an anchor is compared with its own
        positives and negatives only, otherwise with all other rows.
      temperature: τ, above 0.
      normalize: whether to divide each embedding by its norm.
      mask: `[N]`, bool or numbers; a row with 0 is left out.

    With neither labels nor pairs, row `i` of the first half and row `i` of the second
    half are positives of each other (NT-Xent, both directions).

    Returns:
      A scalar.

    Raises:
      ValueError: labels and pairs together, negative pairs alone, an odd number of rows
        with neither, a bad temperature, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6], [0.6, 0.8]])
      >>> round(float(losses.contrastive_infonce_loss(x, temperature=1.0)), 4)
      0.9575

    References:
      Khosla et al., Supervised Contrastive Learning (the "out" form), 2020.
      Chen et al., SimCLR (NT-Xent), 2020.
    """
    check_range("temperature", temperature, 0, inclusive=False)
    x, unmasked = _rows(embeddings, mask)
    x = unit_vectors(x) if normalize else x
    positive, others = _candidates(unmasked, labels, positive_pairs, negative_pairs)
    score = jnp.matmul(x, x.T, precision="highest") / as_float(temperature)
    anchors = jnp.any(positive, axis=-1)
    # A row without any comparison would divide 0 by 0; its weight is 0 below.
    compared = others | ~anchors[:, None]
    log_total = jax.nn.logsumexp(score, axis=-1, where=compared)
    picked = jnp.sum(jnp.where(positive, score, 0), axis=-1)
    picked = safe_divide(picked, jnp.sum(as_float(positive), axis=-1))
    return weighted_mean(log_total - picked, as_float(anchors))


@with_checked_arrays
def simctg_loss(
    hidden_states: Float[Array, "B S D"],
    *,
    margin: float | int = 0.5,
    mask: Shaped[Array, "B S"] | None = None,
    segment_ids: Integer[Array, "B S"] | None = None,
) -> Float[Array, ""]:
    """Computes the SimCTG loss, which penalizes similar hidden states within a row.

    `max(0, margin − 1 + cos(h_i, h_j))`, the mean over all ordered pairs `i ≠ j` of
    unmasked tokens of one row, 0 if there is none. It needs one `[B, S, S]` array. The
    mean is over pairs, while the unified loss averages micro-batches by tokens: if rows
    differ in length, that average is not the mean of the whole batch.

    Args:
      hidden_states: `[B, S, D]`.
      margin: ρ; the loss of a pair with a cosine below `1 − ρ` is 0.
      mask: `[B, S]`, bool or numbers; a position with 0 is left out.
      segment_ids: `[B, S]`; pairs do not cross a segment, and 0 is padding.

    Returns:
      A scalar.

    Raises:
      ValueError: shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> h = jnp.array([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]])
      >>> round(float(losses.simctg_loss(h)), 4)
      0.1333

    References:
      Su et al., A Contrastive Framework for Neural Text Generation, 2022.
    """
    check_range("margin", margin, 0)
    unmasked = jnp.ones_like(hidden_states[..., 0], dtype=bool)
    if mask is not None:
        unmasked &= as_weights("mask", mask) != 0
    if segment_ids is not None:
        segment_ids = as_labels("segment_ids", segment_ids)
        unmasked &= segment_ids != 0
    pairs = _pairs_of(unmasked)
    if segment_ids is not None:
        pairs &= segment_ids[:, :, None] == segment_ids[:, None, :]
    h = unit_vectors(jnp.where(unmasked[..., None], as_float(hidden_states), 0))
    cosine = jnp.einsum("bid,bjd->bij", h, h, precision="highest")
    return weighted_mean(jnp.maximum(margin - 1 + cosine, 0), as_float(pairs))
