//! From the pipeline file's prompts to a job's steps: templates compiled, examples and formats read from their files,
//! the order of steps found out. Knows nothing of rows. Invariant: whatever is wrong with them is found before any work.

use super::policy::Policy;
use super::spec::{Choices, FewShotSpec, FormatSpec, PromptSpec};
use crate::config::{Config, sampling_params};
use crate::format::openai::one_of;
use crate::grammar::Grammars;
use crate::prepare::{PromptTemplate, RowForm, Step, Turn};
use crate::request::{AnswerFormat, Message, Params};
use crate::storage::{Location, Storage};
use crate::text::template::RowTemplate;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use std::sync::Arc;

/// How the rows of a job are read.
pub(super) struct Form {
    pub(super) rows: RowForm,
    /// What completions must be, by step.
    pub(super) policies: Vec<Option<Arc<Policy>>>,
    /// Hash of the files that prompts and checks were made with; empty if there are none.
    pub(super) files_hash: String,
}

/// Reads the prompts of a job.
///
/// # Errors
/// A template that does not compile, a file that can't be read, steps that wait for each other.
pub(super) fn read(config: &Config, storage: &Storage) -> Result<Form> {
    let spec = &config.spec;
    let mut files = Files { storage, hasher: blake3::Hasher::new(), n_read: 0 };
    let mut steps = Vec::new();
    if let Some(prompt) = &spec.prompt {
        steps.push(step(String::new(), prompt, config.defaults.clone(), &mut files).context("prompt")?);
    }
    for step_spec in &spec.step {
        let params = sampling_params(&step_spec.sampling.over(&spec.sampling), true)?;
        let made = step(step_spec.name.clone(), &step_spec.prompt, params, &mut files);
        steps.push(made.with_context(|| format!("step {}", step_spec.name))?);
    }
    let mut policies = Vec::new();
    for i in 0..steps.len().max(1) {
        let own = spec.step.get(i).and_then(|step| step.policy.as_ref());
        let is_scored = steps.get(i).is_some_and(|step| step.template.continuation.is_some());
        ensure!(!is_scored || own.is_none(), "step {}: policy: nothing is generated that could be checked", steps[i].name);
        let asked = own.or(spec.policy.as_ref()).filter(|_| !is_scored);
        let policy = asked.map(|policy| Policy::new(policy, |name| files.read(name))).transpose().context("policy")?;
        if let (Some(step), true) = (steps.get_mut(i), policy.is_some()) {
            step.is_checked = true;
        }
        policies.push(policy.map(Arc::new));
    }
    let files_hash = if files.n_read > 0 { files.hasher.finalize().to_hex().to_string() } else { String::new() };
    if steps.is_empty() {
        return Ok(Form { rows: RowForm::Requests, policies, files_hash });
    }
    if !spec.step.is_empty() {
        find_needs(&mut steps)?;
    }
    Ok(Form { rows: RowForm::Dataset(steps), policies, files_hash })
}

/// Compiles the formats of the steps: a wrong one should stop the job, not be every row's error.
///
/// # Errors
/// A format that can't be compiled.
pub(super) fn check_formats(form: &RowForm, grammars: &Grammars) -> Result<()> {
    let RowForm::Dataset(steps) = form else { return Ok(()) };
    for step in steps {
        let name = if step.name.is_empty() { "prompt".to_owned() } else { format!("step {}", step.name) };
        grammars.compile(&step.params.format).map_err(|why| anyhow::anyhow!("{name}: format: {why}"))?;
    }
    Ok(())
}

/// The files that prompts are made with.
struct Files<'a> {
    storage: &'a Storage,
    hasher: blake3::Hasher,
    n_read: usize,
}

impl Files<'_> {
    fn read(&mut self, name: &str) -> Result<String> {
        let at = Location::parse(name)?;
        let bytes = self.storage.get(&at)?.with_context(|| format!("{} is not there", at.url))?;
        self.hasher.update(blake3::hash(&bytes).as_bytes());
        self.n_read += 1;
        String::from_utf8(bytes.into()).with_context(|| format!("{} is not UTF-8", at.url))
    }
}

fn compile(key: &str, source: &str) -> Result<RowTemplate> {
    RowTemplate::compile(source).with_context(|| key.to_owned())
}

fn step(name: String, prompt: &PromptSpec, mut params: Params, files: &mut Files<'_>) -> Result<Step> {
    let mut turns = Vec::new();
    let turn = |role: &str, key: &str, source: &str| anyhow::Ok(Turn::Template(role.to_owned(), compile(key, source)?.into()));
    if let Some(text) = &prompt.text {
        turns.push(turn("", "text", text)?);
    }
    if let Some(system) = &prompt.system {
        turns.push(turn("system", "system", system)?);
    }
    for message in &prompt.messages {
        turns.push(turn(&message.role, "messages", &message.content)?);
    }
    if let Some(few_shot) = &prompt.few_shot {
        // After the system message, if the chat begins with one.
        let has_system = matches!(turns.first(), Some(Turn::Template(role, _)) if role == "system");
        let place = usize::from(has_system);
        turns.splice(place..place, examples(few_shot, prompt, files).context("few_shot")?);
    }
    if let Some(user) = &prompt.user {
        turns.push(turn("user", "user", user)?);
    }
    if let Some(column) = &prompt.messages_column {
        turns.push(Turn::Column(column.clone()));
    }
    let prefill = prompt.prefill.as_deref().map(|source| compile("prefill", source)).transpose()?;
    let continuation = prompt.continuation.as_deref().map(|source| compile("continuation", source)).transpose()?;
    if let Some(format) = &prompt.format {
        params.format = answer_format(format, files).context("format")?;
        ensure!(!params.ignore_eos && params.min_tokens == 0, "format: can't be combined with ignore_eos or min_tokens");
    }
    Ok(Step {
        name,
        template: PromptTemplate { tokens: prompt.tokens.clone(), turns, prefill, continuation },
        params,
        needs: Vec::new(),
        is_checked: false,
    })
}

/// The turns of worked examples.
fn examples(few_shot: &FewShotSpec, prompt: &PromptSpec, files: &mut Files<'_>) -> Result<Vec<Turn>> {
    let text = files.read(&few_shot.file)?;
    let user = few_shot.user.as_ref().or(prompt.user.as_ref()).context("user is missing")?;
    let (user, assistant) = (compile("user", user)?, compile("assistant", &few_shot.assistant)?);
    let mut turns = Vec::new();
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    for (i, line) in lines.take(few_shot.n.unwrap_or(usize::MAX)) {
        let place = || format!("{}, line {}", few_shot.file, i + 1);
        let row: Map<String, Value> = serde_json::from_str(line).with_context(place)?;
        for (role, template) in [("user", &user), ("assistant", &assistant)] {
            let content = template.render(&row).map_err(|error| anyhow::anyhow!(error)).with_context(place)?;
            turns.push(Turn::Fixed(Message { role: role.into(), content, ..Message::default() }));
        }
    }
    let n_found = turns.len() / 2;
    if let Some(n) = few_shot.n.filter(|&n| n_found < n) {
        bail!("{} has {n_found} examples, {n} were asked for", few_shot.file);
    }
    Ok(turns)
}

fn answer_format(format: &FormatSpec, files: &mut Files<'_>) -> Result<AnswerFormat> {
    if let Some(schema) = &format.json_schema {
        let schema = match schema {
            toml::Value::String(file) => {
                let text = files.read(file)?;
                serde_json::from_str(&text).with_context(|| format!("{file} is not JSON"))?
            }
            inline => serde_json::to_value(inline).context("json_schema")?,
        };
        ensure!(matches!(schema, Value::Object(_)), "json_schema is not an object");
        return Ok(AnswerFormat::JsonSchema(Arc::new(schema)));
    }
    if let Some(choices) = &format.choices {
        let texts = match choices {
            Choices::List(texts) => texts.clone(),
            Choices::File(file) => files.read(file)?.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect(),
        };
        ensure!(!texts.is_empty(), "choices is empty");
        return Ok(AnswerFormat::Regex(one_of(&texts.iter().map(String::as_str).collect::<Vec<_>>())));
    }
    Ok(match (&format.regex, &format.grammar) {
        (Some(regex), _) => AnswerFormat::Regex(regex.clone()),
        (_, Some(grammar)) => AnswerFormat::Lark(grammar.clone()),
        _ => AnswerFormat::JsonObject,
    })
}

/// Finds what each step waits for; steps may stand in any order.
fn find_needs(steps: &mut [Step]) -> Result<()> {
    let names: Vec<String> = steps.iter().map(|step| step.name.clone()).collect();
    let only_scored: Vec<bool> = steps.iter().map(|step| step.template.continuation.is_some()).collect();
    for step in steps.iter_mut() {
        let mut needs = Vec::new();
        for template in step.template.templates() {
            let used = template.names_under("steps");
            if used.is_empty() && template.columns().iter().any(|column| column == "steps") {
                bail!("step {}: name the step: steps.NAME.completion or steps.NAME.parsed", step.name);
            }
            for name in used {
                let place = names.iter().position(|known| *known == name);
                let place = place.with_context(|| format!("step {}: there is no step {name}", step.name))?;
                ensure!(!only_scored[place], "step {}: step {name} scores a text, and has no answer to use", step.name);
                needs.push(place);
            }
        }
        needs.sort_unstable();
        needs.dedup();
        step.needs = needs;
    }
    let mut done = vec![false; steps.len()];
    while let Some(next) = (0..steps.len()).find(|&i| !done[i] && steps[i].needs.iter().all(|&need| done[need])) {
        done[next] = true;
    }
    match done.iter().position(|done| !done) {
        Some(stuck) => bail!("step {} waits for itself, through what it uses", steps[stuck].name),
        None => Ok(()),
    }
}
