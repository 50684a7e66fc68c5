//! Dataset rows: columns to prompts through the templates of a job's steps. A step whose templates use what another step
//! gave (`steps.NAME.completion`, `steps.NAME.parsed`) waits for it; the others can run at once.

use super::{Preparer, Prompt, RowForm};
use crate::format::openai;
use crate::outcome::{ErrorCode, RowError};
use crate::request::{ChatOptions, Input, Message, Params, Request, Truncate};
use crate::text::template::RowTemplate;
use serde_json::{Map, Value, json};

/// One prompt of every row.
pub struct Step {
    /// Its name; empty where the job has one step only.
    pub name: String,
    /// What the model is given.
    pub template: PromptTemplate,
    /// How it is completed.
    pub params: Params,
    /// Indices of the steps whose answers it uses.
    pub needs: Vec<usize>,
    /// Whether its completions are checked, and may be drawn again.
    pub is_checked: bool,
}

/// A dataset row's templates.
pub struct PromptTemplate {
    /// The column that holds the prompt's token ids, if it is not made of turns.
    pub tokens: Option<String>,
    /// The prompt's turns; one of role "" is a prompt as it is, without the model's chat template.
    pub turns: Vec<Turn>,
    /// Text that the answer begins with.
    pub prefill: Option<RowTemplate>,
    /// Text that is scored as the answer; nothing is generated then.
    pub continuation: Option<RowTemplate>,
}

/// One or several turns of a chat.
pub enum Turn {
    /// (role, text)
    Template(String, Box<RowTemplate>),
    /// The same for every row.
    Fixed(Message),
    /// A column that holds messages: `[{"role", "content"}, …]`.
    Column(String),
}

/// What a step gave.
#[derive(Debug, Clone)]
pub struct StepAnswer {
    /// Its (first) completion.
    pub text: String,
    /// The completion as JSON, where its format is JSON and it is whole.
    pub parsed: Option<Value>,
}

impl PromptTemplate {
    /// The columns that it reads.
    pub fn columns(&self) -> Vec<String> {
        let whole = self.turns.iter().filter_map(|turn| if let Turn::Column(column) = turn { Some(column) } else { None });
        let rendered = self.templates().flat_map(RowTemplate::columns);
        rendered.chain(whole).chain(&self.tokens).cloned().collect()
    }

    /// Its templates.
    pub fn templates(&self) -> impl Iterator<Item = &RowTemplate> {
        let turns =
            self.turns.iter().filter_map(|turn| if let Turn::Template(_, template) = turn { Some(&**template) } else { None });
        turns.chain(&self.prefill).chain(&self.continuation)
    }
}

/// A row's columns, and what its steps have given under `steps`.
pub(super) fn with_answers(
    mut columns: Map<String, Value>,
    steps: &[Step],
    answers: &[Option<StepAnswer>],
) -> Map<String, Value> {
    let given = steps.iter().zip(answers).filter_map(|(step, answer)| {
        let answer = answer.as_ref()?;
        Some((step.name.clone(), json!({"completion": answer.text, "parsed": answer.parsed})))
    });
    columns.insert("steps".into(), Value::Object(given.collect()));
    columns
}

impl Preparer {
    /// The row's own columns.
    pub(super) fn read_columns(&self, text: &str) -> Result<Map<String, Value>, RowError> {
        let columns = openai::parse_object(text)?;
        let is_kept = |name: &String| self.kept_columns.as_ref().is_none_or(|kept| kept.contains(name));
        if let Some(name) = self.result_columns.iter().find(|name| columns.contains_key(*name) && is_kept(name)) {
            let message = "the row has a column of the same name as a result column; set output.prefix";
            return Err(RowError::field(ErrorCode::InvalidValue, name, message));
        }
        if self.has_steps() && columns.contains_key("steps") {
            let message = "a column of this name is hidden by the steps' answers; rename it";
            return Err(RowError::field(ErrorCode::InvalidValue, "steps", message));
        }
        Ok(columns)
    }

    fn has_steps(&self) -> bool {
        matches!(&self.form, RowForm::Dataset(steps) if steps.iter().any(|step| !step.needs.is_empty()))
    }

    /// The prompt of one step.
    pub(super) fn step_prompt(
        &self,
        row_idx: u64,
        steps: &[Step],
        step: usize,
        columns: &Map<String, Value>,
    ) -> Result<Prompt, RowError> {
        let Step { template, params, name, .. } = &steps[step];
        let field = if name.is_empty() { "prompt".to_owned() } else { format!("step {name}") };
        let mut request = Request {
            row_idx,
            model: None,
            inputs: Vec::new(),
            params: params.clone(),
            chat: ChatOptions::default(),
            truncate: Truncate::Never,
        };
        if let Some(column) = &template.tokens {
            let input = Input::Tokens(column_tokens(columns, column)?);
            let prompt = self.prompt(&request, &input, &field)?;
            return Ok(Prompt { step, ..prompt });
        }
        let mut messages = Vec::new();
        for turn in &template.turns {
            match turn {
                Turn::Template(role, text) => {
                    let content = text.render(columns)?;
                    messages.push(Message { role: role.clone(), content, ..Message::default() });
                }
                Turn::Fixed(message) => messages.push(message.clone()),
                Turn::Column(column) => messages.extend(column_messages(columns, column)?),
            }
        }
        let prefill = template.prefill.as_ref().map(|prefill| prefill.render(columns)).transpose()?;
        let input = match messages.as_slice() {
            [only] if only.role.is_empty() => Input::Text(only.content.clone() + prefill.as_deref().unwrap_or_default()),
            _ => {
                messages.extend(prefill.map(|content| Message { role: "assistant".into(), content, ..Message::default() }));
                Input::Messages(messages)
            }
        };
        request.chat.continue_final = matches!(input, Input::Messages(_)) && template.prefill.is_some();
        let Some(continuation) = &template.continuation else {
            let prompt = self.prompt(&request, &input, &field)?;
            return Ok(Prompt { step, ..prompt });
        };
        // A chat's template writes the tokens that a text begins with; nothing is put after either, it goes on.
        let (prefix, before): (&[u32], String) = match &input {
            Input::Messages(messages) => (&[], self.template.render_chat(messages, &request.chat)?),
            Input::Text(text) => (self.tokenizer.prefix(), text.clone()),
            Input::Tokens(_) => unreachable!("templates make text"),
        };
        let encode = |text: &str| [prefix, &self.tokenizer.encode(text)[..]].concat();
        let whole = encode(&(before.clone() + &continuation.render(columns)?));
        // Where the two texts' tokens part; a token over the border belongs to what is scored.
        let n_before = encode(&before).iter().zip(&whole).take_while(|(a, b)| a == b).count();
        if n_before == 0 || n_before == whole.len() {
            let what = if n_before == 0 { "the text before the continuation" } else { "the continuation" };
            return Err(RowError::field(ErrorCode::InvalidValue, field, format!("{what} has no tokens")));
        }
        // Nothing is drawn: one score, always the same.
        request.params = Params { max_tokens: Some(0), n: 1, temperature: 0.0, logprobs: Some(1), ..request.params };
        let prompt = self.prompt(&request, &Input::Tokens(whole), &field)?;
        Ok(Prompt { step, score_from: Some(n_before as u32), ..prompt })
    }
}

/// The token ids that a column holds.
fn column_tokens(columns: &Map<String, Value>, column: &str) -> Result<Vec<u32>, RowError> {
    let Some(value) = columns.get(column) else {
        return Err(RowError::field(ErrorCode::MissingField, column, "the row has no such column"));
    };
    let ids = value.as_array().map(|ids| ids.iter().map(|id| u32::try_from(id.as_u64()?).ok()).collect::<Option<Vec<u32>>>());
    ids.flatten().ok_or_else(|| RowError::field(ErrorCode::InvalidType, column, "must be a list of token ids"))
}

/// The messages that a column holds.
fn column_messages(columns: &Map<String, Value>, column: &str) -> Result<Vec<Message>, RowError> {
    let bad = |message: String| RowError::field(ErrorCode::InvalidValue, column, message);
    let items = columns.get(column).and_then(Value::as_array);
    let items = items.ok_or_else(|| bad("must be a list of messages".into()))?;
    let text = |item: &Value, key: &str| item.get(key).and_then(Value::as_str).map(str::to_owned);
    let messages = items.iter().enumerate().map(|(i, item)| {
        let role = text(item, "role").ok_or_else(|| bad(format!("message {i} has no role")))?;
        let content = text(item, "content").ok_or_else(|| bad(format!("message {i} has no content that is text")))?;
        Ok(Message { role, content, ..Message::default() })
    });
    messages.collect()
}
