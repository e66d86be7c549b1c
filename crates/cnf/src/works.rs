//! The inside of a function: its joins, and the packet filter around them, in the namespace it runs in.

use std::sync::Arc;

use nsm_kernel::Result;
use nsm_kernel::join::{Join, Layer, check_bridge_filter};
use nsm_kernel::joiner::{Joiner, State};
use nsm_kernel::netlink::Socket;
use nsm_kernel::nft::{self, Family, Netfilter, Table};
use parking_lot::Mutex;

use crate::filter::{self, TABLE, Unfiltered};
use crate::rules::Rules;

/// What a function does with what passes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Nothing.
    Passthrough,
    /// Lets pass what its rules allow.
    Firewall {
        /// The rules.
        rules: Rules,
        /// What happens to frames that rules say nothing of.
        unfiltered: Unfiltered,
    },
}

/// The joins of a function and their filter. A pair of interfaces is joined only when its filter is in place, and what
/// cannot be filtered is not joined.
#[derive(Debug)]
pub struct Works {
    role: Role,
    joiner: Joiner,
    /// Also puts one change after the other.
    netfilter: Mutex<Socket<Netfilter>>,
}

impl Works {
    /// Starts in the namespace of the calling thread: finds the joins that an earlier run has left, keeps them, and
    /// puts up the filter; where all is as it should be, nothing is written.
    ///
    /// # Errors
    /// Missing rights (CAP_NET_ADMIN), or a kernel without nftables.
    pub fn start(role: Role) -> Result<Arc<Self>> {
        let works = Self { role, joiner: Joiner::start()?, netfilter: Mutex::new(Socket::open()?) };
        for join in works.joiner.joins() {
            // It was made by a function of the other kind.
            if join.layer != works.layer(join.layer.clone()) {
                works.joiner.forget(&join.near);
            }
        }
        if matches!(works.role, Role::Firewall { .. })
            && let Err(error) = check_bridge_filter()
        {
            tracing::warn!(%error, "wires that carry Ethernet will be refused, those that carry IP will not");
        }
        let joins = works.joiner.joins();
        works.filter(&mut works.netfilter.lock(), &joins)?;
        Ok(Arc::new(works))
    }

    /// Joins two interfaces, now or when they are there; or changes how they are joined.
    ///
    /// # Errors
    /// What would pass cannot be filtered here.
    pub fn join(&self, join: Join) -> Result<()> {
        let join = Join { layer: self.layer(join.layer), ..join };
        if (Layer::Ethernet { filtered: true }) == join.layer {
            check_bridge_filter()?;
        }
        let mut netfilter = self.netfilter.lock();
        let mut joins = self.joiner.joins();
        joins.retain(|other| other.near != join.near);
        joins.push(join.clone());
        self.filter(&mut netfilter, &joins)?;
        self.joiner.want(join);
        Ok(())
    }

    /// Parts the interfaces that are joined by this near one.
    ///
    /// # Errors
    /// The filter cannot be changed; they are parted all the same.
    pub fn part(&self, near: &str) -> Result<()> {
        let mut netfilter = self.netfilter.lock();
        self.joiner.forget(near);
        self.filter(&mut netfilter, &self.joiner.joins())
    }

    /// How far the join of this near interface is; `None`: there is none.
    pub fn state(&self, near: &str) -> Option<State> {
        self.joiner.state(near)
    }

    /// Parts everything and takes the filter away.
    ///
    /// # Errors
    /// The filter cannot be removed.
    pub fn stop(self) -> Result<()> {
        self.joiner.stop();
        let mut netfilter = self.netfilter.into_inner();
        let removed = [Family::Inet, Family::Bridge].map(|family| nft::remove(&mut netfilter, family, TABLE));
        removed.into_iter().collect::<Result<Vec<_>>>().map(drop)
    }

    /// The layer as this role does it.
    fn layer(&self, layer: Layer) -> Layer {
        match layer {
            Layer::Ethernet { .. } => {
                Layer::Ethernet { filtered: matches!(self.role, Role::Firewall { .. }) }
            }
            ip @ Layer::Ip { .. } => ip,
        }
    }

    fn tables(&self, joins: &[Join]) -> Vec<Table> {
        match &self.role {
            Role::Passthrough => filter::passthrough(joins),
            Role::Firewall { rules, unfiltered } => filter::firewall(rules, *unfiltered, joins),
        }
    }

    fn filter(&self, netfilter: &mut Socket<Netfilter>, joins: &[Join]) -> Result<()> {
        let mut joins = joins.to_vec();
        // The same joins are the same tables, in whatever order they came.
        joins.sort_by(|a, b| a.near.cmp(&b.near));
        for change in nft::apply(netfilter, &self.tables(&joins))? {
            tracing::debug!(%change, "packet filter");
        }
        Ok(())
    }
}
