"""What is special about the top-down decoder. `test_decoder.py` tests what all kinds share."""

import torch

from pipeline.decoder.top_down import TopDownState
from tests.kinds import B, K, P, example_batch, small_decoder


def test_the_image_reaches_the_words_through_attention_and_the_mean_region_alone() -> None:
    """With neither a context vector nor a mean region, captions of all images are equal."""
    model, (grids, tokens) = small_decoder("top_down"), example_batch()
    tokens = tokens[:1].expand(B, -1, -1)
    assert not torch.allclose(*model(grids, tokens)[0][:2])
    with torch.no_grad():
        model.mean_proj.weight.zero_()
        assert not torch.allclose(*model(grids, tokens)[0][:2])
        model.context_proj.weight.zero_()
    torch.testing.assert_close(*model(grids, tokens)[0][:2])


def test_attention_has_read_the_word_and_the_language_lstm_its_result() -> None:
    model, (grids, tokens) = small_decoder("top_down"), example_batch()
    images = model.prepare(grids)
    state = model.init_state(images, K)
    assert isinstance(state, TopDownState)
    assert not any(values.any() for values in state)
    outputs = [model.decode_step(torch.full((B, K), token), state, images) for token in (5, 6)]
    assert (outputs[0][2] - outputs[1][2]).abs().amax(dim=-1).min() > 1e-4  # alpha
    # Attention that the coverage forces on one region changes h2, and leaves h1 as it is.
    covered = state._replace(coverage=1e3 * torch.eye(P, dtype=torch.float64)[0].expand(B, K, P))
    _, next_state, _ = model.decode_step(tokens[:, :, 0], state, images)
    _, next_covered, _ = model.decode_step(tokens[:, :, 0], covered, images)
    assert torch.equal(next_state.h1, next_covered.h1)
    assert not torch.allclose(next_state.h2, next_covered.h2)
