//! Text to tokens and back: everything between a row's words and the ids that a model sees. Pure: opens no files,
//! knows no engine and no field names but those of models' own files (GGUF metadata, Hugging Face's JSON).

pub mod hf;
pub mod template;
pub mod thinking;
pub mod tokenizer;
pub mod tool_calls;
