# The project's figures, once. Both clouds take them from here.

variable "name" {
  description = "First part of every name that is made."
  type        = string
  default     = "cxr"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,19}$", var.name))
    error_message = "name has 1 to 20 lower-case letters, digits and hyphens, and starts with a letter."
  }
}

variable "nodes" {
  description = "Virtual machines that run all the time: services, monitoring, tracking, data."
  type        = number
  default     = 4

  validation {
    condition     = var.nodes >= 1 && var.nodes <= 50 && floor(var.nodes) == var.nodes
    error_message = "nodes is a whole number from 1 to 50."
  }
}

variable "storage_gb" {
  description = "Persistent volume, GB."
  type        = number
  default     = 100

  validation {
    condition     = var.storage_gb >= 10
    error_message = "storage_gb is at least 10."
  }
}

variable "occasional_ip" {
  description = "A second floating IP, for the canary or a demonstration."
  type        = bool
  default     = false
}

variable "gpus" {
  description = "GPUs of one block, by purpose."
  type        = object({ training = number, evaluation = number })
  default     = { training = 4, evaluation = 2 }

  validation {
    condition     = var.gpus.training >= 0 && var.gpus.evaluation >= 0
    error_message = "There are no negative GPUs."
  }
}

variable "block_hours" {
  description = "Length of one block of GPUs, hours."
  type        = number
  default     = 6

  validation {
    condition     = var.block_hours >= 1 && var.block_hours <= 24
    error_message = "block_hours is from 1 to 24."
  }
}

variable "block_days" {
  description = "Days of the week with a block: 0 is Monday."
  type        = set(number)
  default     = [1, 4]

  validation {
    condition     = alltrue([for d in var.block_days : contains([0, 1, 2, 3, 4, 5, 6], d)])
    error_message = "A day is from 0 (Monday) to 6 (Sunday)."
  }
}

variable "block_start_hour" {
  description = "Hour at which a block starts, UTC."
  type        = number
  default     = 18

  validation {
    condition     = var.block_start_hour >= 0 && var.block_start_hour <= 23
    error_message = "block_start_hour is from 0 to 23."
  }
}

variable "first_monday" {
  description = "The Monday on which the plan starts, e.g. 2026-01-05."
  type        = string

  validation {
    condition     = can(timeadd("${var.first_monday}T00:00:00Z", "0s")) && try(formatdate("EEE", "${var.first_monday}T00:00:00Z"), "") == "Mon"
    error_message = "first_monday is a date such as 2026-01-05, and a Monday."
  }
}

variable "weeks" {
  description = "How many weeks are planned ahead."
  type        = number
  default     = 4

  validation {
    condition     = var.weeks >= 1 && var.weeks <= 52
    error_message = "weeks is from 1 to 52."
  }
}

variable "admin_cidr" {
  description = "The network from which operators come."
  type        = string

  validation {
    condition     = can(cidrhost(var.admin_cidr, 0)) && var.admin_cidr != "0.0.0.0/0"
    error_message = "admin_cidr is a network such as 192.0.2.0/24, and not the whole internet."
  }
}

variable "clinic_cidr" {
  description = "The network from which films come."
  type        = string

  validation {
    condition     = can(cidrhost(var.clinic_cidr, 0))
    error_message = "clinic_cidr is a network such as 198.51.100.0/24."
  }
}

variable "environment" {
  description = "What the machines are for, a set of values of deploy/helm: none, development, staging or production. The plan refuses machines on which it would not fit."
  type        = string
  default     = "none"

  validation {
    condition     = contains(["none", "development", "staging", "production"], var.environment)
    error_message = "environment is none, development, staging or production."
  }
}

variable "machine" {
  description = "Size of one machine that runs all the time: processors and memory, GB."
  type        = object({ cores = number, memory_gb = number })
  default     = { cores = 2, memory_gb = 4 }

  validation {
    condition     = var.machine.cores >= 1 && var.machine.memory_gb >= 1
    error_message = "A machine has at least one processor and 1 GB."
  }
}

variable "serving_gpus" {
  description = "Machines with one GPU each that run all the time, for the language service."
  type        = number
  default     = 0

  validation {
    condition     = var.serving_gpus >= 0 && var.serving_gpus <= 50 && floor(var.serving_gpus) == var.serving_gpus
    error_message = "serving_gpus is a whole number from 0 to 50."
  }
}

variable "gpus_per_host" {
  description = "GPUs of one leased machine: leases are for whole machines."
  type        = number
  default     = 4

  validation {
    condition     = var.gpus_per_host >= 1 && floor(var.gpus_per_host) == var.gpus_per_host
    error_message = "gpus_per_host is a whole number, at least 1."
  }
}
