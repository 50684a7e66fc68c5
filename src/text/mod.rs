//! Text to tokens and back: everything between a row's words and the ids that a model sees. Pure: knows no files (but
//! GGUF metadata), no engine and no JSON field names.

pub mod template;
pub mod tokenizer;
pub mod tool_calls;
