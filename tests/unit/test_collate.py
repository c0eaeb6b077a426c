"""Collation and micro-batches."""

from pilaf_ray.data.collate import collate, collate_shared, micro_batches


def test_response_tokens_are_predicted_from_the_position_before() -> None:
    batch = collate([((1, 2, 3), (4, 5)), ((6,), (7, 8, 9))])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.token_row.tolist() == [0, 0, 1, 1, 1]
    assert batch.token_position.tolist() == [2, 3, 0, 1, 2]
    assert batch.targets.tolist() == [4, 5, 7, 8, 9]


def test_micro_batches_hold_every_item_once_within_the_budget() -> None:
    lengths = [5, 9, 3, 9, 7, 2, 30]
    groups = micro_batches(lengths, rows_per_item=2, max_tokens=40)
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert groups == [[6], [1, 3], [4, 0], [2, 5]]


def test_responses_that_share_a_prompt_see_the_prompt_and_themselves() -> None:
    batch = collate_shared([((1, 2), ((3, 4), (5,))), ((6,), ((7,), (8,)))])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 1, 0, 0]]
    assert batch.attention_mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert batch.attention_mask[1, 0].int().tolist()[2] == [1, 0, 1, 0, 0]
    assert batch.attention_mask[1, 0].int().tolist()[4] == [0, 0, 0, 0, 1]
    assert batch.targets.tolist() == [3, 4, 5, 7, 8]
    assert batch.token_sequence.tolist() == [0, 0, 1, 2, 3]
    assert batch.token_row.tolist() == [0, 0, 0, 1, 1]
    assert batch.token_position.tolist() == [1, 2, 1, 0, 0]
    assert batch.sequences == 4
