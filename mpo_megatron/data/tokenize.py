"""From the text of groups to token ids: chat template, end-of-turn token, length rules.

A group becomes the ids of its prompt [P], the same for all responses, and the ids of each response [L_k],
which are the tokens that the model is trained on. Rules:

- With a chat template, the prompt is the conversation with the generation prompt, and a response is what the
  template writes after it, up to and including the first special token (the end-of-turn token, never the
  newline that templates put behind it). Without one, the prompt is plain text after the tokenizer's own
  leading tokens (BOS), and a response is plain text and EOS.
- A response that the sampler's token limit cut (`finish_reason` "length"), or that is cut here, has no
  end-of-turn token: the model never said that it was done.
- Prompt and response are tokenised as one text. Where a token spans the border between them, the response is
  tokenised alone, so that the prompt's ids stay those which the model was sampled with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mpo_megatron.data.chat import ChatTemplate
from mpo_megatron.data.faults import LONG_PROMPT, OnFault, stop
from mpo_megatron.data.schema import RecordError, ScoredGroup, brief, fail
from mpo_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATIONS = ("error", "skip", "left")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeOptions:
    """How groups are tokenised.

    Attributes:
        max_prompt_length: tokens that a prompt may have.
        max_length: tokens that a prompt and one response may have together; longer responses are cut.
        truncation: what happens to a longer prompt: "error" stops, "skip" leaves the group out, "left" keeps
            the prompt's last `max_prompt_length` tokens.
        apply_chat_template: None applies the tokenizer's chat template if it has one.
        system_prompt: goes before conversations without a system message; needs a chat template.

    Raises:
        ConfigError: a value breaks its rule.
    """

    max_prompt_length: int
    max_length: int
    truncation: str = "error"
    apply_chat_template: bool | None = None
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1:
            raise ConfigError(f"max_prompt_length={self.max_prompt_length} must be at least 1; raise it")
        if self.max_length <= self.max_prompt_length:
            raise ConfigError(
                f"max_length={self.max_length} counts prompt and response, so it must be greater than "
                f"max_prompt_length={self.max_prompt_length}; raise max_length or lower max_prompt_length"
            )
        if self.truncation not in TRUNCATIONS:
            raise ConfigError(f"truncation={self.truncation!r} must be one of: {', '.join(TRUNCATIONS)}")


@dataclass(frozen=True, slots=True)
class GroupTokens:
    """Ids of one group, and how many of its responses each rule acted on.

    Attributes:
        prompt_ids: [P].
        response_ids: n lists [L_k], each with at least one id.
        prompt_truncated: the prompt lost its beginning ("left").
        responses_truncated: cut to `max_length`.
        border_merges: tokenised alone, since a token spans the border to the prompt.
        rewritten_by_template: kept as given, since the template writes them otherwise (without reasoning).
    """

    prompt_ids: list[int]
    response_ids: list[list[int]]
    prompt_truncated: bool
    responses_truncated: int
    border_merges: int
    rewritten_by_template: int


class _Texts(NamedTuple):
    """One group before it is tokenised; `answers` hold the end-of-turn token where there is one."""

    prompt: str
    answers: list[str]
    rewritten: int


class GroupTokenizer:
    """Tokenises batches of groups with one tokenizer and one set of options."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", options: TokenizeOptions) -> None:
        """Raises ConfigError if the tokenizer or its chat template lacks something that the options need."""
        self._tokenizer = tokenizer
        self._options = options
        self._template: ChatTemplate | None = None
        self._leading_ids: list[int] = []
        self._eos_ids: list[int] = []
        has_template = bool(tokenizer.chat_template)
        if options.apply_chat_template and not has_template:
            raise ConfigError(
                "apply_chat_template=true, and the tokenizer has no chat template; set it to false for plain "
                "prompts and EOS, or give the tokenizer a template (chat_template.jinja in its folder)"
            )
        if has_template and options.apply_chat_template is not False:
            self._template = ChatTemplate(tokenizer, options.system_prompt)
            return
        if options.system_prompt is not None:
            raise ConfigError("system_prompt needs a chat template, and none is applied; remove it")
        if tokenizer.eos_token_id is None:
            raise ConfigError("without a chat template responses end with EOS: set the tokenizer's eos_token")
        self._leading_ids = _leading_ids(tokenizer)
        self._eos_ids = [tokenizer.eos_token_id]

    def __call__(self, groups: Sequence[ScoredGroup], on_fault: OnFault = stop) -> list[GroupTokens | None]:
        """The ids of each group, in order; None where it is left out.

        Args:
            on_fault: told of groups that the template refuses or that have no tokens, which are left out if it does
                not raise them, and of long prompts that the options leave out.

        Raises:
            RecordError: a prompt above the limit (truncation "error"), or what `on_fault` raises.
        """
        texts = [self._texts_or_fault(group) for group in groups]
        given = [text for text in texts if isinstance(text, _Texts)]
        prompts = iter(self._encode([text.prompt for text in given]))
        whole = iter(self._encode([text.prompt + answer for text in given for answer in text.answers]))
        tokens: list[GroupTokens | None] = []
        for group, text in zip(groups, texts, strict=True):
            try:
                if isinstance(text, RecordError):
                    raise text
                tokens.append(
                    self._group_tokens(group, text, next(prompts), [next(whole) for _ in text.answers])
                )
            except RecordError as error:
                if error.fault == LONG_PROMPT and self._options.truncation == "error":
                    raise
                on_fault(error)
                tokens.append(None)
        return tokens

    def _group_tokens(
        self, group: ScoredGroup, text: _Texts, prompt_ids: list[int], whole: list[list[int]]
    ) -> GroupTokens:
        """Applies the length rules to the ids of the prompt and of prompt + answer for each answer."""
        options = self._options
        kept_prompt_ids = self._leading_ids + prompt_ids
        too_long = len(kept_prompt_ids) > options.max_prompt_length
        if too_long and options.truncation != "left":
            limit, length = options.max_prompt_length, len(kept_prompt_ids)
            found = f"the prompt has {length} tokens, and max_prompt_length is {limit}"
            fix = "truncation to skip (leave such groups out) or left (keep the last tokens of such prompts)"
            fail(group.where, f"{found}; raise it, or set {fix}", LONG_PROMPT)
        kept_prompt_ids = kept_prompt_ids[-options.max_prompt_length :]
        room = options.max_length - len(kept_prompt_ids)
        response_ids, merges, cut = [], 0, 0
        for response, answer, ids in zip(group.responses, text.answers, whole, strict=True):
            merged = ids[: len(prompt_ids)] != prompt_ids
            answer_ids = self._encode([answer])[0] if merged else ids[len(prompt_ids) :]
            if response.finish_reason != "length":
                answer_ids = answer_ids + self._eos_ids
            if not answer_ids:
                fail(group.where, f"the response {brief(response.text)} has no tokens; remove it", "template")
            merges += merged
            cut += len(answer_ids) > room
            response_ids.append(answer_ids[:room])
        return GroupTokens(kept_prompt_ids, response_ids, too_long, cut, merges, text.rewritten)

    def _texts_or_fault(self, group: ScoredGroup) -> _Texts | RecordError:
        try:
            return self._texts(group)
        except RecordError as error:
            return error

    def _texts(self, group: ScoredGroup) -> _Texts:
        if self._template is None:
            if len(group.messages) != 1:
                found = f"the prompt has {len(group.messages)} messages, and no chat template is applied"
                fix = "give the prompt as one text, or use a tokenizer with a chat template"
                fail(group.where, f"{found}; {fix}", "template")
            return _Texts(group.messages[0].content, [response.text for response in group.responses], 0)
        prompt = self._template.prompt(group.messages, group.where)
        answers, rewritten = [], 0
        for response in group.responses:
            answer, as_written = self._template.answer(group.messages, prompt, response.text, group.where)
            rewritten += not as_written
            answers.append(answer if response.finish_reason == "length" else answer + self._template.end)
        return _Texts(prompt, answers, rewritten)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,  # a template's text has its own
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about model_max_length: the limits here are the options'
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def _leading_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts before a text by itself (BOS or nothing), without what it puts after."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(dressed) - len(bare) + 1) if dressed[i : i + len(bare)] == bare]
    assert starts, f"the tokenizer's special tokens change the ids of the text: {bare} and {dressed}"
    return list(dressed[: starts[0]])
