"""Small byte-level BPE tokenizers, made on the spot, and chat templates with habits of well-known ones."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Name three colours of the rainbow in one sentence.",
    "Red, green and blue are three colours of the rainbow.",
    "You are a helpful assistant. Answer in at most thirty words.\n\n- one\n- two\n",
)

# As SmolLM2 and Qwen2.5: a default system turn, a header for every turn, a newline after the end of a turn.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Strips answers, puts spaces around them, ignores add_generation_prompt, refuses system turns.
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'].strip() }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'].strip() }} {{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
# Puts an empty block of reasoning before answers (Qwen3) and drops theirs (DeepSeek-R1).
REASONING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{{ message['content'].split('</think>')[-1] }}"
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITHOUT_GENERATION_PROMPT = CHATML.partition("{% if add_generation_prompt %}")[0]


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return str(tokenizer.to_str())


def make_tokenizer(
    chat_template: str | None = CHATML, *, adds_bos: bool = False, adds_eos: bool = False
) -> PreTrainedTokenizerFast:
    """A fast tokenizer of 400 tokens; it may put its BOS <s> and EOS </s> around texts by itself."""
    backend = Tokenizer.from_str(_trained())
    if adds_bos or adds_eos:
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos),
            special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer
