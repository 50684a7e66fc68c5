#![doc = include_str!("ARCHITECTURE.md")]

pub mod allocator;
pub mod cache;
pub mod cli;
pub mod config;
pub mod device;
pub mod engine;
pub mod fingerprint;
pub mod format;
pub mod gguf;
pub mod grammar;
pub mod hf;
pub mod hub;
pub mod journal;
mod map;
pub mod model;
pub mod outcome;
pub mod pipeline;
pub mod plan;
pub mod prepare;
pub mod request;
pub mod server;
pub mod storage;
pub mod store;
pub mod tensor;
pub mod text;
pub mod window;
