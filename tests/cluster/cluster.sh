#!/usr/bin/env bash
# SPDX-FileCopyrightText: Copyright 2026 The nemo_ptq authors
# SPDX-License-Identifier: Apache-2.0
#
# A real Slurm with two nodes and accounting on one Debian machine, for the tests. Root only; nothing is left behind.
#
#   cluster.sh install   installs Debian's packages that are missing; exits with a reason where it cannot be had
#   cluster.sh up        starts it, in a few seconds
#   cluster.sh kill N    kills all that runs on a node, as if it had lost its power
#   cluster.sh boot N    starts a node again
#   cluster.sh down      ends it and removes everything
#
# Each node is a network namespace with an address and a host name of its own. All files are in one directory, which
# $SLURM_CONF points into: a Slurm that the machine has already keeps its files, its ports and its munge.
set -euo pipefail

DIR=/run/nemo_ptq_cluster
NODES=(n1 n2)
NETWORK=198.18.77 # of the range for benchmarks, which no real network has
BRIDGE=nemoptq0
PACKAGES=(slurm-wlm munge slurmdbd slurm-wlm-mysql-plugin mariadb-server iproute2)
PROGRAMS=(slurmctld slurmd slurmdbd sacct munged mariadbd ip)
export SLURM_CONF=$DIR/slurm.conf PATH=$PATH:/usr/sbin:/sbin

fail() { echo "cluster.sh: $*" >&2; exit 1; }
namespace() { echo "nemo_ptq_$1"; }
address() { echo "$NETWORK.1${1#n}"; }

# wait_for SECONDS WHAT COMMAND...: until the command succeeds.
wait_for() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < deadline)) || { tail -n 5 $DIR/log/*.log >&2; fail "$what is not there after a while"; }
        sleep 0.05
    done
}

missing() { for program in "${PROGRAMS[@]}"; do command -v "$program" >/dev/null || echo "$program"; done; }

install() {
    ((EUID == 0)) || fail "a cluster needs root"
    if [[ $(missing) ]]; then
        command -v apt-get >/dev/null || fail "there is no $(missing | head -n 1), and no apt-get"
        # The machine's own services would start with their installation.
        local policy=/usr/sbin/policy-rc.d log=/tmp/nemo_ptq_cluster_apt.log
        if [[ ! -e $policy ]]; then
            trap 'rm -f /usr/sbin/policy-rc.d' EXIT
            printf '#!/bin/sh\nexit 101\n' >$policy
            chmod +x $policy
        fi
        export DEBIAN_FRONTEND=noninteractive
        { timeout 120 apt-get update && timeout 400 apt-get install -y --no-install-recommends "${PACKAGES[@]}"; } \
            >$log 2>&1 </dev/null || fail "these packages are not to be had: ${PACKAGES[*]} (see $log)"
        [[ ! $(missing) ]] || fail "there is no $(missing | head -n 1) in Debian's packages"
    fi
    local probe='mount --bind /etc/hosts /etc/hosts && ip link add br0 type bridge'
    probe+=' && ip link add v0 type veth peer name v1'
    unshare --net --uts --mount sh -c "$probe" 2>/dev/null ||
        fail "this machine allows no network namespaces"
}

write_configuration() {
    local cgroup=disabled
    [[ $(slurmd -V) != *" 22."* ]] || cgroup=cgroup/v1 # which does not know the other, and is not used either
    echo "CgroupPlugin=$cgroup" >$DIR/cgroup.conf
    printf '127.0.0.1 localhost\n%s.1 %s\n' $NETWORK "$(hostname -s)" >$DIR/hosts
    for node in "${NODES[@]}"; do echo "$(address "$node") $node" >>$DIR/hosts; done

    cat >$DIR/slurmdbd.conf <<END
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
END
    chmod 600 $DIR/slurmdbd.conf
    # The timing parameters make a job start, fail and be accounted for in a second or two.
    cat >$SLURM_CONF <<END
ClusterName=nemo_ptq
SlurmctldHost=$(hostname -s)($NETWORK.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket,cred_expire=10
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
StateSaveLocation=$DIR/state
SlurmdPidFile=$DIR/slurmd.%n.pid
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmdSpoolDir=$DIR/spool.%n
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStoragePass=$DIR/munge.socket
JobAcctGatherType=jobacct_gather/linux
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
KillWait=5
SlurmdTimeout=10
ReturnToService=2
$(for node in "${NODES[@]}"; do
        echo "NodeName=$node NodeAddr=$(address "$node") CPUs=4 RealMemory=16000"
    done)
PartitionName=batch Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
END
}

start_accounting() {
    mariadb-install-db --no-defaults --user=root --datadir=$DIR/db --auth-root-authentication-method=socket \
        --skip-test-db >$DIR/log/mariadb-install.log 2>&1 || fail "no database: see $DIR/log/mariadb-install.log"
    setsid mariadbd --no-defaults --user=root --datadir=$DIR/db --socket=$DIR/db.socket --pid-file=$DIR/mariadbd.pid \
        --skip-networking --performance-schema=OFF --innodb-buffer-pool-size=64M --innodb-log-file-size=32M \
        >$DIR/log/mariadbd.log 2>&1 </dev/null &
    wait_for 60 "the database" mariadb-admin --no-defaults -S $DIR/db.socket ping
    # slurmdbd finds the socket where MariaDB's client library does.
    MYSQL_UNIX_PORT=$DIR/db.socket slurmdbd
    wait_for 60 slurmdbd sacctmgr -n show cluster
    sacctmgr -i add cluster nemo_ptq >/dev/null
    sacctmgr -i add account demo >/dev/null
    sacctmgr -i add user root account=demo >/dev/null
}

add_network() {
    ip link add $BRIDGE type bridge
    ip address add $NETWORK.1/24 dev $BRIDGE
    ip link set $BRIDGE up
    for node in "${NODES[@]}"; do
        local name
        name=$(namespace "$node")
        ip netns add "$name"
        ip link add "$BRIDGE$node" type veth peer name eth0 netns "$name"
        ip link set "$BRIDGE$node" master $BRIDGE up
        ip -n "$name" address add "$(address "$node")/24" dev eth0
        ip -n "$name" link set lo up
        ip -n "$name" link set eth0 up
    done
}

boot() {
    mkdir -p "$DIR/spool.$1"
    ip netns exec "$(namespace "$1")" unshare --uts --mount sh -c \
        "mount --bind $DIR/hosts /etc/hosts; hostname $1; exec slurmd -N $1 </dev/null >$DIR/log/slurmd.$1.start 2>&1"
}

kill_node() {
    local processes
    while processes=$(ip netns pids "$(namespace "$1")" 2>/dev/null) && [[ $processes ]]; do
        # shellcheck disable=SC2086 # one word for each process
        kill -KILL $processes 2>/dev/null || true
        sleep 0.05
    done
}

are_idle() { [[ $(sinfo -h -N -p batch -o %T | grep -c '^idle$') == "${#NODES[@]}" ]]; }
is_controlled() { scontrol ping | grep -q UP && sinfo; }
is_accounted() { sacct -nX -j "$1" -o State | grep -q COMPLETED; }

up() {
    [[ ! -e $DIR ]] || down
    [[ ! $(missing) ]] || fail "there is no $(missing | head -n 1): run cluster.sh install"
    mkdir -p -m 755 $DIR $DIR/log $DIR/state
    trap '[[ $? == 0 ]] || down' EXIT
    write_configuration
    dd if=/dev/urandom of=$DIR/munge.key bs=128 count=1 status=none
    chmod 400 $DIR/munge.key
    munged --force --socket=$DIR/munge.socket --key-file=$DIR/munge.key --pid-file=$DIR/munged.pid \
        --log-file=$DIR/log/munged.log --seed-file=$DIR/munge.seed >/dev/null 2>&1
    start_accounting
    add_network
    slurmctld
    # A node that comes before its controller is not noticed.
    wait_for 60 slurmctld is_controlled
    for node in "${NODES[@]}"; do boot "$node"; done
    wait_for 60 "a node" are_idle
    # The first records reach the accounting late.
    local job
    job=$(sbatch --parsable -o /dev/null --wrap true)
    wait_for 60 "the first job" is_accounted "$job"
}

down() {
    for node in "${NODES[@]}"; do
        kill_node "$node"
        ip netns delete "$(namespace "$node")" 2>/dev/null || true
    done
    ip link delete $BRIDGE 2>/dev/null || true
    for program in slurmctld slurmdbd mariadbd munged; do
        local process
        process=$(cat $DIR/$program.pid 2>/dev/null) || continue
        [[ $(cat "/proc/$process/comm" 2>/dev/null) == "$program" ]] || continue
        kill "$process"
        for ((i = 0; i < 100; i++)); do
            kill -0 "$process" 2>/dev/null || continue 2
            sleep 0.05
        done
        kill -KILL "$process" 2>/dev/null || true
    done
    rm -rf $DIR
}

case ${1-} in
    install | up | down) "$1" ;;
    kill) kill_node "$2" ;;
    boot) boot "$2" ;;
    *) sed -n '5,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
