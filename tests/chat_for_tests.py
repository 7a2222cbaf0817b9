"""Chat templates as families of models have them, and a tokenizer to read them with."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}"
    "[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}"
    "<|im_end|>{% endif %}\n{% endfor %}"
)
# Earlier answers are shortened once others follow, as some templates do with reasoning.
FORGETFUL = (
    "{% for m in messages %}{{ m['role'] }}: {% if loop.last %}{{ m['content'] }}{% else %}..."
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "marked": MARKED,
}
# System messages stand in the first user's turn.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] "
    "{{ (system if loop.first else '') + m['content'] }} [/INST]{% else %} {{ m['content'] }} "
    "{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n{{ m['content'] }}<|eot|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|head|>{{ m['role'] }}\n{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant\n{% endif %}"
)
# A system message of the template's own where there is none.
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
) + CHATML
# What was thought is left out of earlier answers.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not "
    "loop.last %}{{ m['content'].split('</think>')[-1].lstrip() }}{% else %}{{ m['content'] }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n"
    "{{ m['content'] | trim }}\n\n{% elif m['role'] == 'assistant' %}### Response:\n"
    "{{ m['content'] | trim }}{{ eos_token }}\n\n{% else %}{{ m['content'] | trim }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
)
TWELVE = {
    **TEMPLATES,
    "forgetful": FORGETFUL,
    "llama2": LLAMA2,
    "phi": PHI,
    "zephyr": ZEPHYR,
    "qwen": QWEN,
    "thinking": THINKING,
    "plain": PLAIN,
}
SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"),
    *("<turn>", "</turn>", "[INST]", "[/INST]"),
)
TALK = [
    {"role": "user", "content": "hi you"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "so, because."},
]


def letters(template: str | None = None) -> PreTrainedTokenizerFast:
    """A token per byte, and one for each special word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=template,
    )


D_VOCAB = len(SPECIAL) + 256
