//! What the model needs of a file, or of a folder of files, with weights in it. Knows no format.

use super::ModelSpec;
use crate::tensor::Tensor;
use anyhow::{Context, Result};
use std::path::Path;

/// Weights and what they mean. Tensors go by the names that GGUF gives them, whatever the file calls them; those of
/// experts that are not stacked are `blk.L.ffn_gate.E.weight` and so on.
pub trait ModelFile: Send {
    /// The path that the user gave, for messages.
    fn path(&self) -> &Path;

    /// The family of models, as the file names it; for people.
    fn architecture(&self) -> String;

    /// What the weights mean, checked against every tensor's name and shape.
    ///
    /// # Errors
    /// What the forward pass does not have; what is missing, contradictory or of the wrong shape.
    fn spec(&self) -> Result<ModelSpec>;

    /// A tensor that may be absent.
    fn find_tensor(&self, name: &str) -> Option<Tensor<'_>>;

    /// Names of all tensors, sorted.
    fn tensor_names(&self) -> Vec<&str>;

    /// All bytes that the weights' values and meaning depend on, for hashing.
    fn content(&self) -> Vec<&[u8]>;

    /// Frees the memory that holds what was read of the file so far. It may be read again.
    fn release(&self);

    /// A tensor that the model cannot do without.
    fn tensor(&self, name: &str) -> Result<Tensor<'_>> {
        self.find_tensor(name).with_context(|| format!("{}: tensor {name} is missing", self.path().display()))
    }
}
