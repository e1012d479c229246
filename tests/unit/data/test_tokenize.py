"""The ids that the model sees and says, checked as text and against the tokenizer's own chat template."""

from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mpo_megatron.data.schema import DataError, Message, ScoredGroup, ScoredResponse
from mpo_megatron.data.tokenize import GroupTokenizer, GroupTokens, TokenizeOptions
from mpo_megatron.errors import ConfigError
from tests.helpers.tokenizers import (
    CHATML,
    CHATML_WITHOUT_GENERATION_PROMPT,
    LLAMA2,
    REASONING,
    make_tokenizer,
)

QUESTION = "Name three colours of the rainbow."
ANSWERS = ("Red, green and blue.", "The quick brown fox.\n\n- one", "Ünïcode 🦊")
CHATML_PROMPT = (
    "<|im_start|>system\nYou are helpful.<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
)


def options(**changes: Any) -> TokenizeOptions:
    return TokenizeOptions(**{"max_prompt_length": 500, "max_length": 1000, **changes})


def group(
    answers: Sequence[str] = ANSWERS,
    *,
    question: str = QUESTION,
    before: Sequence[tuple[str, str]] = (),
    finish_reason: str = "stop",
) -> ScoredGroup:
    messages = tuple(Message(role, content) for role, content in [*before, ("user", question)])
    responses = tuple(ScoredResponse(text, float(i), finish_reason) for i, text in enumerate(answers))
    return ScoredGroup("g", messages, responses, "train.jsonl:17")


def tokens_of(tokenizer: PreTrainedTokenizerFast, item: ScoredGroup, **changes: Any) -> GroupTokens:
    (tokens,) = GroupTokenizer(tokenizer, options(**changes))([item])
    assert tokens is not None
    return tokens


def texts_of(tokenizer: PreTrainedTokenizerFast, tokens: GroupTokens) -> tuple[str, list[str]]:
    return tokenizer.decode(tokens.prompt_ids), [tokenizer.decode(ids) for ids in tokens.response_ids]


# ---- chat templates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (LLAMA2, "</s>")])
@pytest.mark.parametrize("before", [(), (("user", "Hi."), ("assistant", "Hello."))])
def test_ids_are_those_of_the_whole_conversation_through_the_end_of_turn(
    template: str, end: str, before: tuple[tuple[str, str], ...]
) -> None:
    tokenizer = make_tokenizer(template)
    item = group(before=before)
    tokens = tokens_of(tokenizer, item)
    turns = [{"role": message.role, "content": message.content} for message in item.messages]
    for response, ids in zip(item.responses, tokens.response_ids, strict=True):
        whole = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": response.text}], return_dict=False
        )
        last = max(i for i, token in enumerate(whole) if token == tokenizer.convert_tokens_to_ids(end))
        assert tokens.prompt_ids + ids == whole[: last + 1]
        assert ids.count(tokenizer.convert_tokens_to_ids(end)) == 1
    assert tokens.prompt_ids == tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    assert (tokens.border_merges, tokens.responses_truncated, tokens.rewritten_by_template) == (0, 0, 0)


def test_chatml_texts() -> None:
    tokenizer = make_tokenizer(CHATML)
    prompt, answers = texts_of(tokenizer, tokens_of(tokenizer, group()))
    assert prompt == CHATML_PROMPT
    assert answers == [answer + "<|im_end|>" for answer in ANSWERS]  # and no newline after it


def test_llama2_texts_have_one_bos_and_the_stripped_answer() -> None:
    tokenizer = make_tokenizer(LLAMA2, adds_bos=True)
    prompt, answers = texts_of(tokenizer, tokens_of(tokenizer, group([" Red.\n", "Blue."])))
    assert prompt == f"<s>[INST] {QUESTION} [/INST]"
    assert answers == [" Red. </s>", " Blue. </s>"]


@pytest.mark.parametrize("template", [CHATML, LLAMA2])
def test_answers_that_the_token_limit_cut_have_no_end_of_turn(template: str) -> None:
    tokenizer = make_tokenizer(template)
    complete = tokens_of(tokenizer, group(["Red.", "Blue."]))
    cut = tokens_of(tokenizer, group(["Red.", "Blue."], finish_reason="length"))
    assert cut.prompt_ids == complete.prompt_ids
    lead = " " if template == LLAMA2 else ""
    assert texts_of(tokenizer, cut)[1] == [f"{lead}Red.", f"{lead}Blue."]
    assert cut.responses_truncated == 0  # nothing was cut here


def test_end_of_turn_left_in_the_text_by_the_sampler_is_not_doubled() -> None:
    for template, end in ((CHATML, "<|im_end|>"), (LLAMA2, "</s>")):
        tokenizer = make_tokenizer(template)
        assert tokens_of(tokenizer, group(["Red." + end, "Blue."])) == tokens_of(
            tokenizer, group(["Red.", "Blue."])
        )


def test_reasoning_block_that_the_template_puts_first_belongs_to_the_answer() -> None:
    tokenizer = make_tokenizer(REASONING)
    tokens = tokens_of(tokenizer, group(["Red.", "Blue."]))
    prompt, answers = texts_of(tokenizer, tokens)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert answers == ["<think>\n\n</think>\n\nRed.<|im_end|>", "<think>\n\n</think>\n\nBlue.<|im_end|>"]
    assert tokens.rewritten_by_template == 0


def test_reasoning_that_the_template_drops_is_kept_and_counted() -> None:
    tokenizer = make_tokenizer(REASONING)
    tokens = tokens_of(tokenizer, group(["<think>\nWarm.\n</think>\n\nRed.", "Blue."]))
    assert texts_of(tokenizer, tokens)[1][0] == "<think>\nWarm.\n</think>\n\nRed.<|im_end|>"
    assert tokens.rewritten_by_template == 1


def test_template_without_end_of_turn_token_ends_with_eos() -> None:
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer = make_tokenizer(template)
    assert texts_of(tokenizer, tokens_of(tokenizer, group(["Red.", "Blue."])))[1] == ["Red.</s>", "Blue.</s>"]
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither chat template nor tokenizer has an end-of-turn token"):
        GroupTokenizer(tokenizer, options())


def test_system_prompt_goes_where_there_is_none() -> None:
    tokenizer = make_tokenizer(CHATML)
    prompt, _ = texts_of(tokenizer, tokens_of(tokenizer, group(), system_prompt="Be brief."))
    assert prompt == CHATML_PROMPT.replace("You are helpful.", "Be brief.")
    own = group(before=[("system", "Be long.")])
    prompt, _ = texts_of(tokenizer, tokens_of(tokenizer, own, system_prompt="Be brief."))
    assert prompt == CHATML_PROMPT.replace("You are helpful.", "Be long.")


def test_template_that_refuses_the_system_role() -> None:
    tokenizer = make_tokenizer(LLAMA2)
    with pytest.raises(
        ConfigError,
        match=r"^system_prompt: .* refuses messages of system, user \(Only user and assistant roles",
    ):
        GroupTokenizer(tokenizer, options(system_prompt="Be brief."))
    with pytest.raises(
        DataError, match=r"^train\.jsonl:17: .* refuses messages of system, user .*; remove the s"
    ):
        tokens_of(tokenizer, group(before=[("system", "Be brief.")]))


def test_template_that_leaves_out_the_system_prompt() -> None:
    template = CHATML.replace("message in messages", "message in messages if message['role'] != 'system'")
    with pytest.raises(ConfigError, match="leaves out system_prompt"):
        GroupTokenizer(make_tokenizer(template), options(system_prompt="Be brief."))


def test_template_without_generation_prompt() -> None:
    tokenizer = make_tokenizer(CHATML_WITHOUT_GENERATION_PROMPT)
    with pytest.raises(
        ConfigError, match=r"has no generation prompt: it writes '<\|im_start\|>assistant\\n'"
    ):
        GroupTokenizer(tokenizer, options())


def test_template_that_leaves_out_answers() -> None:
    template = CHATML.replace("message in messages", "message in messages if message['role'] == 'user'")
    with pytest.raises(ConfigError, match="leaves out answers"):
        GroupTokenizer(make_tokenizer(template), options())


# ---- plain text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize(("adds_bos", "adds_eos"), [(False, False), (True, False), (True, True)])
def test_plain_text_has_the_tokenizers_bos_and_ends_with_eos(
    template: str | None, adds_bos: bool, adds_eos: bool
) -> None:
    tokenizer = make_tokenizer(template, adds_bos=adds_bos, adds_eos=adds_eos)
    tokens = tokens_of(tokenizer, group(), apply_chat_template=None if template is None else False)
    prompt, answers = texts_of(tokenizer, tokens)
    assert prompt == ("<s>" if adds_bos else "") + QUESTION
    assert answers == [answer + "</s>" for answer in ANSWERS]
    assert tokens.border_merges == 0
    cut = tokens_of(tokenizer, group(finish_reason="length"), apply_chat_template=False)
    assert texts_of(tokenizer, cut)[1] == list(ANSWERS)


def test_token_across_the_border_leaves_the_prompt_as_it_is() -> None:
    tokenizer = make_tokenizer(None)
    merging, plain = "rainbow in one", "7"
    prompt = "Name three colours of the "
    apart = tokenizer(prompt)["input_ids"] + tokenizer(merging)["input_ids"]
    assert tokenizer(prompt + merging)["input_ids"] != apart, "otherwise nothing merges here"
    tokens = tokens_of(tokenizer, group([merging, plain], question=prompt))
    assert tokens.prompt_ids == tokenizer(prompt)["input_ids"]
    assert tokens.prompt_ids + tokens.response_ids[0] == [*apart, tokenizer.eos_token_id]
    assert tokens.border_merges == 1
    assert texts_of(tokenizer, tokens) == (prompt, [f"{merging}</s>", f"{plain}</s>"])


def test_plain_text_takes_no_conversations() -> None:
    item = group(before=[("user", "Hi."), ("assistant", "Hello.")])
    with pytest.raises(DataError, match=r"train\.jsonl:17: the prompt has 3 messages, and no chat template"):
        tokens_of(make_tokenizer(None), item)


def test_options_that_need_what_the_tokenizer_lacks() -> None:
    tokenizer = make_tokenizer(None)
    with pytest.raises(ConfigError, match="apply_chat_template=true, and the tokenizer has no chat template"):
        GroupTokenizer(tokenizer, options(apply_chat_template=True))
    with pytest.raises(ConfigError, match="system_prompt needs a chat template"):
        GroupTokenizer(tokenizer, options(system_prompt="Be brief."))
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="responses end with EOS"):
        GroupTokenizer(tokenizer, options())


# ---- lengths -------------------------------------------------------------------------------------------


def test_prompt_at_the_limit_is_whole_and_one_above_it_is_not() -> None:
    tokenizer = make_tokenizer(CHATML)
    length = len(tokens_of(tokenizer, group()).prompt_ids)
    assert len(tokens_of(tokenizer, group(), max_prompt_length=length).prompt_ids) == length
    with pytest.raises(DataError) as caught:
        tokens_of(tokenizer, group(), max_prompt_length=length - 1)
    assert str(caught.value) == (
        f"train.jsonl:17: the prompt has {length} tokens, and max_prompt_length is {length - 1}; raise it, or set "
        "truncation to skip (leave such groups out) or left (keep the last tokens of such prompts)"
    )


def test_long_prompt_is_skipped_among_others() -> None:
    tokenizer = make_tokenizer(CHATML)
    short, long = group(), group(question=QUESTION * 10)
    limit = len(tokens_of(tokenizer, short).prompt_ids)
    tokenize = GroupTokenizer(tokenizer, options(max_prompt_length=limit, truncation="skip"))
    first, second, third = tokenize([short, long, group(["Red.", "Blue."])])
    assert second is None
    assert first == tokens_of(tokenizer, short)
    assert third == tokens_of(tokenizer, group(["Red.", "Blue."]))
    assert tokenize([]) == []


@pytest.mark.parametrize("adds_bos", [False, True])
def test_long_prompt_keeps_its_end(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(None, adds_bos=adds_bos)
    whole = tokens_of(tokenizer, group())
    left = tokens_of(tokenizer, group(), max_prompt_length=5, truncation="left")
    assert left.prompt_ids == whole.prompt_ids[-5:]
    assert left.response_ids == whole.response_ids
    assert left.prompt_truncated
    assert not whole.prompt_truncated


def test_long_responses_are_cut_and_lose_their_end_of_turn() -> None:
    tokenizer = make_tokenizer(CHATML)
    whole = tokens_of(tokenizer, group())
    prompt, lengths = len(whole.prompt_ids), [len(ids) for ids in whole.response_ids]
    room = sorted(lengths)[1]  # one is longer, one fits exactly, one is shorter
    tokens = tokens_of(tokenizer, group(), max_prompt_length=prompt, max_length=prompt + room)
    assert tokens.response_ids == [ids[:room] for ids in whole.response_ids]
    assert tokens.responses_truncated == 1
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [ids[-1] == end for ids in tokens.response_ids] == [length <= room for length in lengths]


def test_room_for_responses_counts_the_cut_prompt() -> None:
    tokens = tokens_of(make_tokenizer(None), group(), max_prompt_length=5, max_length=8, truncation="left")
    assert [len(ids) for ids in tokens.response_ids] == [3, 3, 3]
    assert tokens.responses_truncated == 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_prompt_length": 0}, "max_prompt_length=0 must be at least 1"),
        ({"max_prompt_length": 8, "max_length": 8}, "max_length=8 counts prompt and response"),
        ({"truncation": "right"}, "truncation='right' must be one of: error, skip, left"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        options(**changes)
