"""Text from models: batched continuation, decoding strategies, measures of repetition."""
