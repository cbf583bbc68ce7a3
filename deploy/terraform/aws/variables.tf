variable "name" {
  description = "First part of every name that is made."
  type        = string
  default     = "cxr"
}

variable "nodes" {
  description = "Virtual machines that run all the time."
  type        = number
  default     = 4
}

variable "storage_gb" {
  description = "Persistent volume, GB."
  type        = number
  default     = 100
}

variable "occasional_ip" {
  description = "A second public address. The last machine moves to the public subnet for it, which makes it anew: drain it before."
  type        = bool
  default     = false
}

variable "gpus" {
  description = "GPUs of one block, by purpose."
  type        = object({ training = number, evaluation = number })
  default     = { training = 4, evaluation = 2 }
}

variable "first_monday" {
  description = "The Monday on which the plan of leases starts."
  type        = string
}

variable "weeks" {
  description = "How many weeks of leases are planned."
  type        = number
  default     = 4
}

variable "admin_cidr" {
  description = "The network from which operators come."
  type        = string
}

variable "clinic_cidr" {
  description = "The network from which films come."
  type        = string
}

variable "private_cidr" {
  description = "The private network. Its first half is for machines without a public address, its last eighth for those with one."
  type        = string
  default     = "10.40.0.0/24"
}

variable "public_key" {
  description = "The operators' SSH key, public part."
  type        = string
}

variable "region" {
  description = "AWS region."
  type        = string
  default     = "eu-central-1"
}

variable "instance_type" {
  description = "Type of the machines: 2 processors and 4 GB, as m1.medium."
  type        = string
  default     = "t3.medium"
}

variable "gpu_instance_type" {
  description = "Type of a machine with GPUs."
  type        = string
  default     = "p4d.24xlarge"
}

variable "gpus_per_instance" {
  description = "GPUs of one such machine."
  type        = number
  default     = 8
}

variable "image_id" {
  description = "Image of the machines (Ubuntu 24.04)."
  type        = string
}

variable "gpu_image_id" {
  description = "Image of the machines with GPUs, with their driver."
  type        = string
}

variable "block_days" {
  description = "Days of the week with a block of GPUs: 0 is Monday."
  type        = set(number)
  default     = [1, 4]
}

variable "block_start_hour" {
  description = "Hour at which a block starts, UTC."
  type        = number
  default     = 18
}

variable "block_hours" {
  description = "Length of one block, hours."
  type        = number
  default     = 6
}

variable "environment" {
  description = "What the machines are for: none, development, staging or production of deploy/helm. Machines on which it would not fit are refused."
  type        = string
  default     = "none"
}

variable "serving_gpus" {
  description = "Machines with one GPU each that run all the time, for the language service: 1 for staging, 2 for production."
  type        = number
  default     = 0
}

variable "serving_instance_type" {
  description = "Type of a machine with one GPU that runs all the time."
  type        = string
  default     = "g6.xlarge"
}
