"""What is special about adaptive attention: the visual sentinel. `test_decoder.py` tests what all kinds share."""

from dataclasses import replace

import torch

from tests.kinds import K, T, example_batch, small_decoder


def test_the_weight_of_the_sentinel_follows_equation_12() -> None:
    model, (grids, tokens) = small_decoder("adaptive"), example_batch()
    _, alpha = model(grids, tokens)
    images = model.prepare(grids)
    state = model.init_state(images, K)
    for t in range(T):
        _, next_state, step_alpha = model.decode_step(tokens[:, :, t], state, images)
        projected = model._project_words(model.embedding(tokens[:, :, t])) + images.image_terms
        projected = projected + state.h @ model.state_proj.weight.T
        sentinel = projected[..., : state.h.shape[-1]].sigmoid() * next_state.c.tanh()  # eqs. 9, 10
        query, coverage_weight = model.query_proj(next_state.h).split([len(model.score_weight), 1], dim=-1)
        sentinel_score = (query + sentinel @ model.sentinel_proj.weight.T).relu() @ model.score_weight  # [B, K]
        scores = (images.keys.unsqueeze(1) + query.unsqueeze(2)).relu() @ model.score_weight  # [B, K, P]
        scores = scores + coverage_weight * state.coverage
        beta = sentinel_score.exp() / (sentinel_score.exp() + scores.exp().sum(dim=-1))
        for weights in (alpha[:, :, t], step_alpha):
            torch.testing.assert_close(1 - weights.sum(dim=-1), beta)
        state = next_state


def test_a_word_that_attends_to_the_sentinel_alone_does_not_depend_on_the_regions() -> None:
    model, (grids, tokens) = small_decoder("adaptive"), example_batch()
    with torch.no_grad():
        model.score_weight.fill_(1)
        model.sentinel_proj.weight.fill_(1e4)
        model.state_proj.bias.fill_(3)  # a positive sentinel
    images = model.prepare(grids)
    logits, _, alpha = model.decode_step(tokens[:, :, 0], model.init_state(images, K), images)
    assert alpha.sum(dim=-1).max() < 1e-9
    others = replace(images, regions=images.regions.flip(0))
    changed, *_ = model.decode_step(tokens[:, :, 0], model.init_state(others, K), others)
    torch.testing.assert_close(changed, logits)
