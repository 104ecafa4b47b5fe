"""The decoder against the equations of the paper, written out one word at a time in float64."""

import pytest
import torch
from torch import Tensor

from pipeline.captions.vocabulary import PAD
from pipeline.decoder.soft_attention import DecoderParams, Dropout, SoftAttentionDecoder, places
from pipeline.decoder.soft_attention_reference import SoftAttentionReference, reference_names
from pipeline.training.loss import caption_loss

SIZES = DecoderParams(
    embedding_size=7, hidden_size=6, attention_size=5, dropout=0.0, region_dropout=0.0, word_dropout=0.0
)
B, K, T, P, C, V = 3, 2, 4, 9, 8, 11


def decoder() -> SoftAttentionDecoder:
    torch.manual_seed(1)
    return SoftAttentionDecoder(SIZES, grid=(3, 3), channels=C, words=V).double()


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    grids = torch.rand(B, P, C, generator=generator, dtype=torch.float64)
    return grids, torch.randint(0, V, (B, K, T), generator=generator)


def textbook(model: SoftAttentionDecoder, grid: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """One caption [T] of one grid [P, C]: keys anew at every word, gates one by one."""
    attention_size, state_size = SIZES.attention, SIZES.state
    parts = [attention_size, 1, 1, 4 * state_size]
    query_w, beta_w, seek_w, gates_w = model.state_proj.weight.split(parts)
    query_y, beta_y, seek_y, gates_y = model.word_proj.weight.split(parts)
    query_b, beta_b, seek_b, gates_b = model.state_proj.bias.split(parts)
    regions = [
        torch.cat([(region - region.mean()) / torch.sqrt(region.var(correction=0) + 1e-5), place])
        for region, place in zip(grid, places(3, 3).double(), strict=True)
    ]
    mean = torch.stack(regions).mean(0)
    h, c = torch.tanh(model.init_h(mean)), torch.tanh(model.init_c(mean))
    logits, attentions = [], []
    seen = torch.zeros(P, dtype=torch.float64)
    for word in words:
        y = model.embedding.weight[word]
        additive_scores = [
            (model.energy * torch.relu(model.key(a) + query_w @ h + query_y @ y + query_b)).sum() for a in regions
        ]
        alpha = (torch.stack(additive_scores) + (seek_w @ h + seek_y @ y + seek_b) * seen).softmax(0)
        seen = seen + alpha
        beta = torch.sigmoid(beta_w @ h + beta_y @ y + beta_b)
        z = beta * sum(weight * a for weight, a in zip(alpha, regions, strict=True))
        i, f, g, o = (gates_y @ y + gates_w @ h + gates_b + model.context_gates.weight @ z).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        deep = torch.tanh(y + model.state_output(h) + model.context_output.weight @ z)
        logits.append(model.vocabulary(deep))
        attentions.append(alpha)
    return torch.stack(logits), torch.stack(attentions)


def test_teacher_forcing_follows_the_equations() -> None:
    model, (grids, words) = decoder(), example()
    logits, attention = model(grids, words)
    for image in range(B):
        for caption in range(K):
            expected = textbook(model, grids[image], words[image, caption])
            torch.testing.assert_close(logits[image, caption], expected[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(attention[image, caption], expected[1], rtol=1e-10, atol=1e-12)


def test_gradients_follow_the_equations() -> None:
    model, (grids, words) = decoder(), example()
    logits, attention = model(grids, words)
    loss = caption_loss(logits, attention, words)
    loss.total(loss.counts, 0.5).backward()
    fast = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    slow = [[textbook(model, grids[image], words[image, caption]) for caption in range(K)] for image in range(B)]
    logits = torch.stack([torch.stack([pair[0] for pair in row]) for row in slow])
    attention = torch.stack([torch.stack([pair[1] for pair in row]) for row in slow])
    loss = caption_loss(logits, attention, words)
    loss.total(loss.counts, 0.5).backward()
    for mine, parameter in zip(fast, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("side", [3, 5], ids=["fewer regions than words", "more"])
def test_loss_and_gradients_are_those_of_the_textbook(side: int) -> None:
    torch.manual_seed(3)
    sizes = DecoderParams(
        embedding_size=24, hidden_size=20, attention_size=16, dropout=0.0, region_dropout=0.0, word_dropout=0.0
    )
    ours = SoftAttentionDecoder(sizes, grid=(side, side), channels=32, words=40).double()
    its = SoftAttentionReference(ours)
    grids = torch.rand(4, side**2, 32, dtype=torch.float64)
    words = torch.randint(PAD + 1, 40, (4, 3, 7))
    for number, length in enumerate([7, 4, 6, 2, 5, 7, 3, 7, 6, 0, 4, 5]):
        words[number // 3, number % 3, length:] = PAD
    losses = []
    for model in (ours, its):
        loss = caption_loss(*model(grids, words[:, :, :-1]), words[:, :, 1:], label_smoothing=0.1)
        losses.append(loss.total(loss.counts, 0.5))
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-10, atol=0)
    gradients = reference_names({name: weights.grad for name, weights in ours.named_parameters()})
    learned = {name: weights.grad for name, weights in its.named_parameters() if weights.requires_grad}
    assert gradients.keys() - learned.keys() == {"cell.bias_hh"}
    for name, expected in learned.items():
        assert (gradients[name] - expected).norm() < 1e-10 * expected.norm(), name


def test_steps_and_teacher_forcing_agree() -> None:
    model, (grids, words) = decoder(), example()
    logits, attention = model(grids, words)
    regions = model.look(grids)
    state = model.start(regions, K)
    for place in range(T):
        one, state, looked = model.step(words[:, :, place], state, regions)
        torch.testing.assert_close(one, logits[:, :, place])
        torch.testing.assert_close(looked, attention[:, :, place])


def test_attention_is_a_distribution_over_regions() -> None:
    model, (grids, words) = decoder(), example()
    attention = model(grids, words)[1]
    assert attention.min() > 0
    torch.testing.assert_close(attention.sum(-1), torch.ones(B, K, T, dtype=torch.float64))


def test_a_caption_does_not_depend_on_its_neighbors_or_on_later_words() -> None:
    model, (grids, words) = decoder(), example()
    logits = model(grids, words)[0]
    alone = model(grids[1:2], words[1:2, :1, :2])[0]
    torch.testing.assert_close(alone[0, 0], logits[1, 0, :2])


def test_float16_grids_are_taken_as_they_are_stored() -> None:
    grids, words = example()
    model = SoftAttentionDecoder(SIZES, grid=(3, 3), channels=C, words=V)
    assert model(grids.half(), words)[0].dtype == torch.float32


def test_bfloat16_computes_the_same_roughly() -> None:
    torch.manual_seed(1)
    sizes = DecoderParams(
        embedding_size=64, hidden_size=64, attention_size=64, dropout=0.0, region_dropout=0.0, word_dropout=0.0
    )
    model = SoftAttentionDecoder(sizes, grid=(3, 3), channels=C, words=V)
    grids, words = example()

    def loss_and_gradient() -> tuple[float, Tensor]:
        model.zero_grad()
        logits, attention = model(grids.float(), words)
        loss = caption_loss(logits, attention, words)
        loss.total(loss.counts, 0.5).backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        return loss.cross_entropy.item(), torch.cat(gradients)

    exact, gradient = loss_and_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        rough, near = loss_and_gradient()
    assert rough == pytest.approx(exact, rel=0.01)
    assert rough != exact
    assert near.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(gradient, near, dim=0) > 0.99


def test_dropout_zeroes_its_share_and_keeps_the_sum_in_training_alone() -> None:
    torch.manual_seed(0)
    dropout, values = Dropout(0.3), torch.ones(200, 500, requires_grad=True)
    dropped = dropout(values)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped)
    assert dropout.eval()(values) is values


def test_no_two_regions_have_the_same_place_and_neighbors_have_like_ones() -> None:
    table = places(7, 5)
    distances = torch.cdist(table, table)
    assert distances.shape == (35, 35)
    assert (distances + 9 * torch.eye(35)).min() > 0.3
    assert distances[0, 1] < distances[0, 2] < distances[0, 34]
