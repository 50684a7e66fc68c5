//! Checks of what a pipeline file says of prompts, before any row is read.

use super::sampling_params;
use crate::pipeline::spec::{FormatSpec, PipelineSpec, PromptSpec};
use anyhow::{Context as _, Result, bail};

/// Whether the prompts of a pipeline, or of each of its steps, are of one form.
pub(super) fn check_prompts(spec: &PipelineSpec) -> Result<()> {
    if spec.prompt.is_some() && !spec.step.is_empty() {
        bail!("prompt and step: give one of them");
    }
    if let Some(prompt) = &spec.prompt {
        check_prompt(prompt).context("prompt")?;
    }
    for (i, step) in spec.step.iter().enumerate() {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        if step.name.is_empty() || !step.name.chars().all(is_name) || step.name.starts_with(|c: char| c.is_ascii_digit()) {
            bail!("step.name: {:?} is no name (letters, digits and _, not a digit first)", step.name);
        }
        if spec.step[..i].iter().any(|other| other.name == step.name) {
            bail!("step.name: {:?} is used twice", step.name);
        }
        check_prompt(&step.prompt).with_context(|| format!("step {}", step.name))?;
        sampling_params(&step.sampling.over(&spec.sampling), true).with_context(|| format!("step {}", step.name))?;
    }
    Ok(())
}

fn check_prompt(prompt: &PromptSpec) -> Result<()> {
    let forms = [
        prompt.text.is_some(),
        prompt.user.is_some(),
        !prompt.messages.is_empty(),
        prompt.messages_column.is_some(),
        prompt.tokens.is_some(),
    ];
    let takes_system = prompt.user.is_some() || prompt.messages_column.is_some();
    if forms.iter().filter(|&&given| given).count() != 1 || (prompt.system.is_some() && !takes_system) {
        bail!("give one of text, user or messages_column (with an optional system), messages, or tokens");
    }
    if let Some(m) = prompt.messages.iter().find(|m| !["system", "user", "assistant"].contains(&m.role.as_str())) {
        bail!("messages: role {:?} is not one of system, user, assistant", m.role);
    }
    if let Some(few_shot) = &prompt.few_shot {
        if prompt.text.is_some() || prompt.tokens.is_some() {
            bail!("few_shot: needs a chat; with text, write the examples into it");
        }
        if few_shot.user.is_none() && prompt.user.is_none() {
            bail!("few_shot.user: is required where the prompt has no user");
        }
    }
    if prompt.tokens.is_some() && (prompt.prefill.is_some() || prompt.continuation.is_some()) {
        bail!("tokens: can't be combined with prefill or continuation");
    }
    if prompt.prefill.is_some() && prompt.continuation.is_some() {
        bail!("prefill and continuation: give one of them");
    }
    if let Some(format) = &prompt.format {
        let FormatSpec { json_schema, json_object, regex, grammar, choices } = format;
        let forms = [json_schema.is_some(), *json_object, regex.is_some(), grammar.is_some(), choices.is_some()];
        if forms.iter().filter(|&&given| given).count() != 1 {
            bail!("format: give one of json_schema, json_object, regex, grammar, choices");
        }
        if prompt.continuation.is_some() || prompt.prefill.is_some() {
            bail!("format: can't be combined with prefill or continuation");
        }
    }
    Ok(())
}
