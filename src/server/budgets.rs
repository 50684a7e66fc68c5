//! What a key may be charged: in a day, in a month, or at all. Knows no call. Invariants: what a key was charged is what the ledger
//! says, whatever was restarted; what a call may come to is taken before it runs and given back when it is charged, so that of those
//! that come at the same time none but the last that is let in goes beyond the budget.

use super::App;
use super::errors::ApiError;
use super::models::now;
use super::prices::{Amount, Price};
use crate::pipeline::hosted::Totals;
use crate::store::ledger;
use anyhow::Result;
use axum::http::StatusCode;
use chrono::{DateTime, Datelike as _, Months, NaiveDate, NaiveTime, SecondsFormat, Utc};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// When a budget is whole again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Period {
    /// At the beginning of each day, in UTC.
    Day,
    /// At the beginning of each month, in UTC.
    Month,
    /// Never.
    #[default]
    Total,
}

impl Period {
    fn as_str(self) -> &'static str {
        match self {
            Self::Day => "day",
            Self::Month => "month",
            Self::Total => "total",
        }
    }

    /// The day on which the one that has this day began, and the one on which the next does.
    fn days(self, day: NaiveDate) -> Option<(NaiveDate, NaiveDate)> {
        match self {
            Self::Day => Some((day, day.succ_opt()?)),
            Self::Month => {
                let first = day.with_day(1)?;
                Some((first, first.checked_add_months(Months::new(1))?))
            }
            Self::Total => None,
        }
    }

    /// When the one that has this second began, and when the next does: unix seconds, on the hour.
    fn around(self, at: u64) -> (u64, Option<u64>) {
        let day = DateTime::<Utc>::from_timestamp(at as i64, 0).map(|at| at.date_naive());
        let seconds = |day: NaiveDate| day.and_time(NaiveTime::MIN).and_utc().timestamp().max(0) as u64;
        day.and_then(|day| self.days(day)).map_or((0, None), |(begin, end)| (seconds(begin), Some(seconds(end))))
    }
}

/// What a key may be charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// In millionths of the currency.
    pub most: u64,
    /// In what time.
    pub period: Period,
}

/// The code of what is refused for its key's budget.
pub(super) const USED_UP: &str = "insufficient_quota";

/// What a key was charged, and what may come of its calls that run.
#[derive(Debug)]
pub(super) struct Purse {
    owner: String,
    budget: Budget,
    currency: String,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The ledger was read up to there for the period that began then; `None`: not at all.
    read: Option<(u64, u64)>,
    /// What it says.
    charged: i128,
    /// What calls that run may come to.
    calls: i128,
    /// What open batches have cost since the period began, or the server.
    batches: i128,
    /// Periods that have begun since the server started.
    n_periods: u64,
}

impl State {
    /// What is not charged yet.
    fn held(&self) -> i128 {
        self.calls + self.batches
    }

    /// The ledger was read up to `until` for the period that began at `begin`, and says `charged`. What batches cost in the one
    /// before counts no more.
    fn note_read(&mut self, (until, begin): (u64, u64), charged: i128) {
        if self.read.is_some_and(|(_, since)| since < begin) {
            self.batches = 0;
            self.n_periods += 1;
        }
        (self.read, self.charged) = (Some((until, begin)), charged);
    }
}

impl Purse {
    pub(super) fn new(owner: String, budget: Budget, currency: String) -> Self {
        Self { owner, budget, currency, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what the ledger has that was not read yet.
    async fn read(&self, app: &App) -> Result<()> {
        let (begin, _) = self.budget.period.around(now());
        let read = self.lock().read.filter(|(_, since)| *since == begin);
        let owner = self.owner.clone();
        let (until, charged) = app
            .store
            .read(move |connection| match read {
                Some((seq, _)) => ledger::charged_after(connection, &owner, seq, begin),
                None => ledger::charged_since(connection, &owner, begin),
            })
            .await?;
        let mut state = self.lock();
        // Of several that read at the same time, one is counted: the others have read no more than the next will.
        if read.is_none() {
            if state.read.is_none_or(|(seq, since)| (since, seq) < (begin, until)) {
                state.note_read((until, begin), charged);
            }
        } else if state.read == read {
            let charged = state.charged + charged;
            state.note_read((until, begin), charged);
        }
        Ok(())
    }

    fn is_used_up_by(&self, cost: i128) -> bool {
        cost >= Amount::of_micro(self.budget.most).0
    }

    /// What is said of it when it is used up.
    fn said(&self) -> String {
        let (state, most) = (self.lock(), Amount::of_micro(self.budget.most));
        let (_, end) = self.budget.period.around(now());
        let each = match self.budget.period {
            Period::Day => " a day",
            Period::Month => " a month",
            Period::Total => "",
        };
        let running =
            if state.held() > 0 { format!(", and {} may come of what runs", Amount(state.held())) } else { String::new() };
        let end = end.and_then(|end| DateTime::<Utc>::from_timestamp(end as i64, 0));
        let end = end
            .map_or_else(String::new, |end| format!("; it is whole again at {}", end.to_rfc3339_opts(SecondsFormat::Secs, true)));
        let (charged, currency) = (Amount(state.charged), &self.currency);
        format!("the key's budget of {most} {currency}{each} is used up: {charged} {currency} were charged{running}{end}")
    }

    /// How much of it is used up.
    pub(super) async fn shown(&self, app: &App) -> Result<Value> {
        self.read(app).await?;
        let (_, end) = self.budget.period.around(now());
        let (state, most) = (self.lock(), Amount::of_micro(self.budget.most));
        Ok(json!({
            "max_cost": most.to_string(), "cost_period": self.budget.period.as_str(), "charged": Amount(state.charged).to_string(),
            "running": Amount(state.held()).to_string(), "resets_at": end,
        }))
    }

    /// Takes what something may come to, before it is charged.
    ///
    /// # Errors
    /// Nothing is left: 429, which waiting for a little does not mend.
    pub(super) async fn hold(self: &Arc<Self>, app: &App, cost: i128) -> Result<HeldCost, ApiError> {
        self.read(app).await?;
        {
            let mut state = self.lock();
            if !self.is_used_up_by(state.charged + state.held()) {
                state.calls += cost;
                return Ok(HeldCost::new(self, false, cost));
            }
        }
        Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, Some(USED_UP), self.said()))
    }
}

/// What something may come to that is not charged yet. Given back when this is dropped.
#[derive(Debug)]
pub(super) struct HeldCost {
    purse: Arc<Purse>,
    is_batch: bool,
    cost: Mutex<Cost>,
}

/// What something has cost, or may come to.
#[derive(Debug, Default)]
struct Cost {
    all: i128,
    /// Of a batch: what of it counted in periods that are over.
    before: i128,
    n_periods: u64,
}

impl HeldCost {
    fn new(purse: &Arc<Purse>, is_batch: bool, cost: i128) -> Self {
        Self { purse: Arc::clone(purse), is_batch, cost: Mutex::new(Cost { all: cost, ..Cost::default() }) }
    }

    fn set(&self, cost: i128) {
        let mut own = self.cost.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.purse.lock();
        if self.is_batch && own.n_periods != state.n_periods {
            (own.before, own.n_periods) = (own.all, state.n_periods);
        }
        let counted = |all: i128| (all - own.before).max(0);
        let more = counted(cost) - counted(own.all);
        let held = if self.is_batch { &mut state.batches } else { &mut state.calls };
        *held += more;
        own.all = cost;
    }
}

impl Drop for HeldCost {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// What a batch costs while it runs.
#[derive(Debug)]
pub(super) struct Spending {
    /// What it is charged by.
    pub(super) price: Price,
    /// What it may cost itself.
    pub(super) most: Option<Amount>,
    /// Of its key's budget, if that has one: what it has cost so far.
    held: Option<HeldCost>,
}

impl Spending {
    /// Of a batch of a key that may have a budget.
    pub(super) fn new(price: Price, most: Option<Amount>, purse: Option<&Arc<Purse>>) -> Self {
        let held = purse.map(|purse| HeldCost::new(purse, true, 0));
        Self { price, most, held }
    }

    /// What so many tokens cost.
    pub(super) fn cost(price: Price, totals: Totals) -> Amount {
        Amount(price.charge(totals.prompt_tokens, totals.cached_tokens, totals.completion_tokens))
    }

    /// It has come to this; whether it costs what it may itself.
    pub(super) fn note(&self, totals: Totals) -> bool {
        let cost = Self::cost(self.price, totals);
        self.held.iter().for_each(|held| held.set(cost.0));
        self.most.is_some_and(|most| cost >= most)
    }

    /// It was charged: that is in the ledger from now on.
    pub(super) fn charged(&self) {
        self.held.iter().for_each(|held| held.set(0));
    }

    /// What is said of its key's budget, if by what is known nothing is left of that. What calls may come to but have not is not
    /// counted: a batch does not wait for it.
    pub(super) fn used_up(&self) -> Option<String> {
        let purse = &self.held.as_ref()?.purse;
        let cost = {
            let state = purse.lock();
            state.charged + state.batches
        };
        purse.is_used_up_by(cost).then(|| purse.said())
    }

    /// As [`Spending::used_up`], with what was charged by now.
    pub(super) async fn look(&self, app: &App) -> Result<Option<String>> {
        if let Some(held) = &self.held {
            held.purse.read(app).await?;
        }
        Ok(self.used_up())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_are_those_of_the_calendar() {
        let at = |text: &str| DateTime::parse_from_rfc3339(text).unwrap().timestamp() as u64;
        for (period, around, begin, end) in [
            (Period::Day, "2026-02-28T23:59:59Z", "2026-02-28T00:00:00Z", "2026-03-01T00:00:00Z"),
            (Period::Day, "2026-03-01T00:00:00Z", "2026-03-01T00:00:00Z", "2026-03-02T00:00:00Z"),
            (Period::Month, "2028-02-29T12:00:00Z", "2028-02-01T00:00:00Z", "2028-03-01T00:00:00Z"),
            (Period::Month, "2026-12-31T23:59:59Z", "2026-12-01T00:00:00Z", "2027-01-01T00:00:00Z"),
        ] {
            assert_eq!(period.around(at(around)), (at(begin), Some(at(end))), "{period:?} {around}");
        }
        assert_eq!(Period::Total.around(at("2026-12-31T23:59:59Z")), (0, None));
    }

    #[test]
    fn what_runs_counts_until_it_is_charged() {
        let purse = Arc::new(Purse::new("a".into(), Budget { most: 3, period: Period::Month }, "USD".into()));
        let price = Price { input: 0, cached: 0, output: 1_000_000 };
        let spending = Spending::new(price, None, Some(&purse));
        assert!(!spending.note(Totals { completion_tokens: 2, ..Totals::default() }) && spending.used_up().is_none());
        let other = Spending::new(price, Some(Amount(1)), Some(&purse));
        assert!(other.note(Totals { completion_tokens: 1, ..Totals::default() }), "it costs what it may");
        let said = spending.used_up().unwrap();
        assert!(
            said.starts_with("the key's budget of 0.000003 USD a month is used up: 0 USD were charged, and 0.000003 may"),
            "{said}"
        );
        other.charged();
        assert!(spending.used_up().is_none(), "it is in the ledger, which was not read again");
        drop(other);
        assert!(spending.used_up().is_none());
    }

    #[test]
    fn a_batch_does_not_wait_for_what_calls_may_come_to() {
        let purse = Arc::new(Purse::new("a".into(), Budget { most: 3, period: Period::Total }, "USD".into()));
        let spending = Spending::new(Price { input: 0, cached: 0, output: 1_000_000 }, None, Some(&purse));
        let call = HeldCost::new(&purse, false, 0);
        call.set(Amount::of_micro(3).0);
        assert!(!spending.note(Totals { completion_tokens: 2, ..Totals::default() }));
        assert!(spending.used_up().is_none());
        assert!(purse.said().contains("0.000005 may come"), "{}", purse.said());
        assert!(!spending.note(Totals { completion_tokens: 3, ..Totals::default() }));
        assert!(spending.used_up().is_some());
    }

    #[test]
    fn a_batch_that_is_open_over_a_periods_end_counts_in_each_with_its_part() {
        let purse = Arc::new(Purse::new("a".into(), Budget { most: 3, period: Period::Day }, "USD".into()));
        let spending = Spending::new(Price { input: 0, cached: 0, output: 1_000_000 }, None, Some(&purse));
        let drawn = |completion_tokens| Totals { completion_tokens, ..Totals::default() };
        purse.lock().note_read((1, 0), 0);
        spending.note(drawn(3));
        assert!(spending.used_up().is_some());
        purse.lock().note_read((5, 0), 0);
        assert!(spending.used_up().is_some(), "the same day");
        purse.lock().note_read((5, 86_400), 0);
        assert!(spending.used_up().is_none());
        spending.note(drawn(5));
        assert!(spending.used_up().is_none(), "two of three");
        spending.note(drawn(6));
        assert!(spending.used_up().is_some());
        // Two days later, of which nothing was told.
        purse.lock().note_read((5, 2 * 86_400), 0);
        purse.lock().note_read((5, 3 * 86_400), 0);
        spending.note(drawn(8));
        assert_eq!(purse.lock().batches, Amount::of_micro(2).0);
        spending.charged();
        assert_eq!(purse.lock().batches, 0);
        drop(spending);
        assert_eq!(purse.lock().batches, 0);
    }
}
